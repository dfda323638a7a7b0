//! One run of a trace: each recorded thread is a thread here, and one call is made at a time, in the trace's
//! order.
//!
//! * Recorded handles and addresses are translated to those of this run ([`state`]).
//! * All device memory is filled when it is allocated, host memory when it is first copied from. What is read
//!   back, and what device memory holds when it is freed, is printed as a digest.
//! * A kernel of the program is not known. In its place the simulator's `fill_u32` writes to the memory that the
//!   stream has used last, and is waited for.
//! * A call that the table ([`crate::roles`]) does not have, or that needs a handle of one, is left out and
//!   counted.

mod call;
mod contents;
mod driver;
mod effects;
mod memory;
mod state;

use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::trace::{Call, Trace};
use call::Player;

/// Before a call at which the run stops: `#pause`, and a line on standard input is waited for.
pub const PAUSE: &str = "#pause";

/// What a run prints for the end: what all memory that is left holds.
pub const END: &str = "end";

/// A thread of the trace.
struct Thread {
    calls: Sender<Arc<Call>>,
    done: Receiver<Value>,
}

/// Plays a trace; prints the lines. Stops before about `pauses` calls, evenly over the trace, where device
/// memory is allocated and nothing is captured.
///
/// # Errors
/// There is no driver, or standard input ends at a pause.
pub fn play(trace: Trace, pauses: usize) -> Result<()> {
    let player = Arc::new(Mutex::new(Player::new()?));
    let mut threads: BTreeMap<i64, Thread> = BTreeMap::new();
    let every = trace
        .calls
        .len()
        .checked_div(pauses)
        .map(|every| every.max(1));
    let mut due = false;
    let mut last = None;
    for (index, call) in trace.calls.into_iter().enumerate() {
        due |= every.is_some_and(|every| index % every == 0);
        if due && lock(&player).can_be_moved() {
            pause()?;
            due = false;
        }
        let number = call.thread;
        let thread = threads.entry(number).or_insert_with(|| start(&player));
        print(&ask(thread, call)?)?;
        last = Some(number);
    }
    if let Some(thread) = last.and_then(|number| threads.get(&number)) {
        let end = Call {
            name: END.to_owned(),
            ..Call::default()
        };
        print(&ask(thread, end)?)?;
    }
    Ok(())
}

fn start(player: &Arc<Mutex<Player>>) -> Thread {
    let (calls, todo) = channel::<Arc<Call>>();
    let (send, done) = channel();
    let player = Arc::clone(player);
    std::thread::spawn(move || {
        while let Ok(call) = todo.recv() {
            let line = lock(&player).play(&call);
            if send.send(line).is_err() {
                return;
            }
        }
    });
    Thread { calls, done }
}

fn ask(thread: &Thread, call: Call) -> Result<Value> {
    let line = call.line;
    thread.calls.send(Arc::new(call)).ok();
    let done = thread.done.recv();
    done.with_context(|| format!("line {line}: the thread that plays it has ended"))
}

fn lock(player: &Mutex<Player>) -> std::sync::MutexGuard<'_, Player> {
    player.lock().unwrap_or_else(PoisonError::into_inner)
}

fn pause() -> Result<()> {
    print_line(PAUSE)?;
    let mut line = String::new();
    let bytes = std::io::stdin().lock().read_line(&mut line);
    if bytes.context("standard input")? == 0 {
        bail!("standard input has ended at a pause");
    }
    Ok(())
}

fn print(line: &Value) -> Result<()> {
    print_line(&line.to_string())
}

fn print_line(line: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")
        .and_then(|()| out.flush())
        .context("standard output")
}
