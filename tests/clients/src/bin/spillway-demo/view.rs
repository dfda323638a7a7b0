//! What is where, live: one line per model on a terminal, redrawn; elsewhere a line whenever something changed.

use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use spillway_clients::sizes::show;

use crate::coordinator::{Coordinator, Workload};

const EVERY: Duration = Duration::from_millis(100);
const CELLS: u64 = 24;
/// The narrowest terminal that is catered for.
const COLUMNS: usize = 79;

struct Inner {
    names: Vec<String>,
    begun: Instant,
    terminal: bool,
    stop: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    note: String,
    /// Lines that stand on the terminal and are drawn over.
    drawn: usize,
    /// The gist of what was printed last where there is no terminal.
    last: String,
}

pub struct View {
    inner: Arc<Inner>,
    thread: Option<JoinHandle<()>>,
}

impl View {
    pub fn start(coordinator: Coordinator, names: &[String]) -> View {
        let inner = Arc::new(Inner {
            names: names.to_vec(),
            begun: Instant::now(),
            terminal: std::io::stdout().is_terminal(),
            stop: AtomicBool::new(false),
            state: Mutex::new(State::default()),
        });
        let thread = std::thread::spawn({
            let inner = inner.clone();
            move || {
                while !inner.stop.load(SeqCst) {
                    // No answer is not the view's to judge: the demo itself fails on what it asks.
                    if let Ok(workloads) = coordinator.workloads() {
                        inner.draw(&workloads);
                    }
                    std::thread::sleep(EVERY);
                }
            }
        });
        View {
            inner,
            thread: Some(thread),
        }
    }

    /// Says what is happening.
    pub fn note(&self, text: &str) {
        let Ok(mut state) = self.inner.state.lock() else {
            return;
        };
        state.note = text.to_string();
        if !self.inner.terminal {
            println!("{:6.1} s  {text}", self.inner.begun.elapsed().as_secs_f64());
            let _ = std::io::stdout().flush();
        }
    }

    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.inner.stop.store(true, SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for View {
    fn drop(&mut self) {
        self.end();
    }
}

/// (on the GPU, on the host). While a program allocates, its grant runs ahead of what is there: who is not being
/// swapped has everything on the GPU.
fn places(workload: &Workload) -> (u64, u64) {
    match workload.state.as_str() {
        "resident" => (workload.used, 0),
        _ => (
            workload.resident.min(workload.used),
            workload.used.saturating_sub(workload.resident),
        ),
    }
}

/// `#` per part on the GPU, `.` per part on the host.
fn bar(workload: &Workload) -> String {
    let (here, there) = places(workload);
    let whole = here + there;
    let cells = usize::try_from(CELLS).unwrap_or(0);
    if whole == 0 {
        return " ".repeat(cells);
    }
    let here = usize::try_from((here * CELLS + whole / 2) / whole)
        .unwrap_or(0)
        .min(cells);
    format!("{}{}", "#".repeat(here), ".".repeat(cells - here))
}

/// What a line off a terminal is about: states, and how far a swap is by quarters.
fn gist(workload: &Workload) -> String {
    let (here, there) = places(workload);
    format!(
        "{} {} ",
        workload.state,
        (here * 4).checked_div(here + there).unwrap_or(0)
    )
}

impl Inner {
    fn draw(&self, workloads: &[(String, Workload)]) {
        let Ok(mut state) = self.state.lock() else {
            return;
        };
        let find = |name: &String| workloads.iter().find(|(n, _)| n == name).map(|(_, w)| w);
        let mut lines = Vec::new();
        let (mut short, mut gists) = (Vec::new(), String::new());
        for name in &self.names {
            let Some(workload) = find(name) else { continue };
            let (here, there) = places(workload);
            let waits = workload
                .waiting_for
                .as_ref()
                .map(|w| format!(", waits for {w}"))
                .unwrap_or_default();
            let stuck = workload
                .not_swappable
                .as_ref()
                .map(|w| format!(", not swappable: {w}"))
                .unwrap_or_default();
            lines.push(format!(
                "  {name}  [{}]  GPU {:>9}  host {:>9}  {}{waits}{stuck}",
                bar(workload),
                show(here),
                show(there),
                workload.state,
            ));
            short.push(format!("{name} [{}] {:<9}", bar(workload), workload.state));
            gists.push_str(&gist(workload));
        }
        let mut out = std::io::stdout().lock();
        if self.terminal {
            lines.push(format!(
                "  {:6.1} s  {}",
                self.begun.elapsed().as_secs_f64(),
                state.note
            ));
            if state.drawn > 0 {
                let _ = write!(out, "\x1b[{}A", state.drawn);
            }
            for line in &lines {
                // A line that wraps would be two to draw over.
                let line: String = line.chars().take(COLUMNS).collect();
                let _ = writeln!(out, "\x1b[2K{line}");
            }
            state.drawn = lines.len();
        } else {
            let line = short.join(" ");
            if !line.is_empty() && gists != state.last {
                let _ = writeln!(out, "{:6.1} s  {line}", self.begun.elapsed().as_secs_f64());
                state.last = gists;
            }
        }
        let _ = out.flush();
    }
}
