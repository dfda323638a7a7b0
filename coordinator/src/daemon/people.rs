//! Who strangers are, as far as `/proc` tells.
//!
//! Some of its files wait for a lock of the process, which a driver in trouble may hold for ever. So
//! they are read on a thread of their own: nobody waits for it, and who cannot be read stays unknown.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use super::handle::Waker;
use super::identity::{container_of, read_proc};

/// Text in the path of a mapped file that shows the driver.
const DRIVER_MARKS: [&str; 3] = ["libcuda.so", "libnvidia-", "/dev/nvidia"];
/// The same for our library.
const LIBRARY_MARK: &str = "libspillway";

/// A process, by its id and when it was started.
pub type Who = (i32, u64);

/// What is known of a process without a session.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Person {
    /// Its user.
    pub uid: Option<u32>,
    /// `/proc/PID/comm`.
    pub command: String,
    /// The container it runs in.
    pub container: Option<String>,
    /// What is loaded in it; `None`: that cannot be read.
    pub loaded: Option<Loaded>,
}

/// See [`Person::loaded`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Loaded {
    /// The driver: it is the process that the driver means.
    pub driver: bool,
    /// `libspillway.so`.
    pub library: bool,
}

/// When a process was started, in the kernel's ticks since boot. `None`: there is none, or it has
/// ended.
#[must_use]
pub fn born(pid: i32) -> Option<u64> {
    born_in(&read_proc(pid, "stat"))
}

fn born_in(stat: &str) -> Option<u64> {
    // The name in parentheses may hold anything; fields are counted after it, from the state on.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let threads: u64 = fields.get(17)?.parse().ok()?;
    // The first thread of a process may end before the others do.
    let ended = matches!(*fields.first()?, "Z" | "X" | "x") && threads <= 1;
    if ended {
        None
    } else {
        fields.get(19)?.parse().ok()
    }
}

fn loaded_in(maps: &str) -> Loaded {
    let has = |mark: &str| maps.lines().any(|line| line.contains(mark));
    Loaded {
        driver: DRIVER_MARKS.iter().any(|mark| has(mark)),
        library: has(LIBRARY_MARK),
    }
}

/// Reads what there is to know. `None`: it is not, or no longer, that process.
fn read((pid, when): Who) -> Option<Person> {
    let same = || born(pid) == Some(when);
    if !same() {
        return None;
    }
    let person = Person {
        uid: std::fs::metadata(format!("/proc/{pid}"))
            .ok()
            .map(|m| m.uid()),
        command: read_proc(pid, "comm").trim().to_owned(),
        container: container_of(&read_proc(pid, "cgroup"), pid),
        loaded: Some(read_proc(pid, "maps"))
            .filter(|maps| !maps.is_empty())
            .map(|maps| loaded_in(&maps)),
    };
    same().then_some(person)
}

/// Those who were asked about.
#[derive(Debug)]
pub struct People {
    known: BTreeMap<Who, Option<Person>>,
    wanted: Sender<Who>,
    found: Receiver<(Who, Person)>,
}

impl People {
    /// Starts the thread.
    ///
    /// # Errors
    /// The system has no threads left.
    pub fn start(waker: Waker) -> io::Result<Self> {
        let (wanted, questions) = channel();
        let (answers, found) = channel();
        thread::Builder::new()
            .name("people".to_owned())
            .spawn(move || {
                for who in questions {
                    if let Some(person) = read(who)
                        && answers.send((who, person)).is_err()
                    {
                        return;
                    }
                    waker.wake();
                }
            })?;
        Ok(Self {
            known: BTreeMap::new(),
            wanted,
            found,
        })
    }

    /// Takes in what was found out.
    pub fn listen(&mut self) {
        while let Ok((who, person)) = self.found.try_recv() {
            if let Some(known) = self.known.get_mut(&who) {
                *known = Some(person);
            }
        }
    }

    /// What is known of a process. Who is new is asked about.
    pub fn get(&mut self, who: Who) -> Option<&Person> {
        let wanted = &self.wanted;
        let known = self.known.entry(who).or_insert_with(|| {
            let _ = wanted.send(who);
            None
        });
        known.as_ref()
    }

    /// Forgets all others.
    pub fn keep(&mut self, who: impl Fn(&Who) -> bool) {
        self.known.retain(|known, _| who(known));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_birth_is_found_behind_any_name() {
        let rest = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 3 18 777 20";
        assert_eq!(born_in(&format!("12 (a) {rest}")), Some(777));
        assert_eq!(born_in(&format!("12 (a b) c) R 1 2) {rest}")), Some(777));
        let dead = rest.replace('S', "Z");
        assert_eq!(born_in(&format!("12 (a) {dead}")), Some(777), "threads run");
        let dead = dead.replace(" 3 18", " 1 18");
        assert_eq!(born_in(&format!("12 (a) {dead}")), None);
        assert_eq!(born_in(""), None);
        assert_eq!(born_in("12 (a) S 1"), None);
    }

    #[test]
    fn we_are_read_and_use_no_driver() {
        let pid = i32::try_from(std::process::id()).expect("a pid");
        let when = born(pid).expect("we live");
        let person = read((pid, when)).expect("ourselves");
        assert_eq!(person.uid, Some(nix::unistd::geteuid().as_raw()));
        assert!(!person.command.is_empty());
        assert_eq!(person.loaded, Some(Loaded::default()));
        assert_eq!(read((pid, when + 1)), None, "somebody else");
    }

    #[test]
    fn what_is_loaded_is_seen_also_after_it_was_replaced() {
        let line = |path: &str| format!("7f00-7f01 r-xp 00000000 08:01 42    {path}\n");
        let maps = line("/usr/lib/libcuda.so.550.1 (deleted)") + &line("/opt/libspillway.so");
        let both = Loaded {
            driver: true,
            library: true,
        };
        assert_eq!(loaded_in(&maps), both);
        assert_eq!(loaded_in(&line("/usr/lib/libc.so.6")), Loaded::default());
    }
}
