//! Memory that changes hands: made under one workload's limit and kept under another's, kept by a descriptor
//! that somebody else has, kept by a process that dies.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::{Command, Stdio};

use crate::child::{Child, inherit};
use crate::driver::{cuMemAlloc_v2, cuMemFree_v2, cuMemRelease};
use crate::family::classic::Classic;
use crate::family::physical::{create, export, import};
use crate::stage::{Case, Done, GRANULE, MIB, Stage, Stop, info, need};
use crate::types::POSIX_FD;
use crate::way::Way;

const BYTES: u64 = 96 * MIB;

/// Takes a descriptor out of another process.
fn fetch(pid: u32, number: i32) -> Result<OwnedFd, Stop> {
    let broken = |what: &str| Stop::Skip(format!("{what}: {}", std::io::Error::last_os_error()));
    // SAFETY: plain numbers; what is returned is checked.
    let process = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if process < 0 {
        return Err(broken("pidfd_open"));
    }
    // SAFETY: the descriptor was opened by the call above, and is nobody else's.
    let process = unsafe { OwnedFd::from_raw_fd(i32::try_from(process).unwrap_or(-1)) };
    // SAFETY: plain numbers; what is returned is checked.
    let got = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) };
    if got < 0 {
        return Err(broken("pidfd_getfd"));
    }
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(got).unwrap_or(-1)) })
}

/// Other workloads make memory within their limits, hand it over and end: whoever is left with it is charged
/// for it, so cannot take more and more. The last piece may be more than it has room for, and one more where the
/// machine is too busy to measure in the time that a program is made to wait.
fn bequeathed(case: &mut Case<'_>, within: bool) -> Done {
    if !within {
        // One at a time.
        case.workloads(2);
        case.left(2 * BYTES);
    }
    let mut kept = Vec::new();
    for number in 0..5 {
        let name = format!("handed-{number}");
        let another = [
            ("SPILLWAY_WORKLOAD", name.as_str()),
            ("SPILLWAY_REQUEST", "64MiB"),
        ];
        let vars = if within { &[][..] } else { &another[..] };
        let mut child = Child::start(&["maker"], vars)?;
        child.tell(&format!("export {BYTES}"));
        let answer = child.hear()?;
        let Some(descriptor) = answer.strip_prefix("fd ") else {
            if within && answer == "refused 2" {
                break;
            }
            return Err(Stop::Broken(format!("the maker says: {answer}")));
        };
        let descriptor = fetch(child.id(), descriptor.parse().unwrap_or(-1))?;
        match import(&descriptor) {
            Ok(handle) => kept.push(handle),
            Err(code) => case.refusal(code, "importing"),
        }
        drop(descriptor);
        drop(child);
        // Its end becomes known to all.
        std::thread::sleep(std::time::Duration::from_millis(300));
        case.top();
    }
    // Besides, all that this process may have of its own.
    let mut held = Vec::new();
    while let Ok(at) = Classic.take(4 * MIB) {
        held.push(at);
        if held.len() > 200 {
            break;
        }
    }
    case.top();
    if kept.is_empty() {
        case.refused("memory of others that ended: not one piece of it");
    }
    for at in held {
        cuMemFree_v2(at);
    }
    for handle in kept {
        cuMemRelease(handle);
    }
    Ok(())
}

/// The handle is released and the only descriptor left is in a process that knows nothing of CUDA: the memory
/// stays, and counts.
fn kept_by_another(case: &mut Case<'_>) -> Done {
    let bytes = 48 * MIB;
    let mut keepers = Vec::new();
    let mut held = Vec::new();
    let mut refused = false;
    for _ in 0..10 {
        let handle = match create(bytes, POSIX_FD) {
            Ok(handle) => handle,
            Err(code) => {
                case.refusal(code, "cuMemCreate");
                refused = true;
                break;
            }
        };
        let descriptor = export(handle).or_else(|code| {
            need(code, "cuMemExportToShareableHandle")?;
            Err(Stop::Broken("no error".to_owned()))
        })?;
        inherit(&descriptor, true);
        let keeper = Command::new("cat")
            .env_remove("LD_PRELOAD")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn();
        keepers.push(keeper.map_err(|why| Stop::Broken(format!("cat: {why}")))?);
        drop(descriptor);
        cuMemRelease(handle);
        case.top();
    }
    while let Ok(at) = Classic.take(4 * MIB) {
        held.push(at);
        if held.len() > 200 {
            break;
        }
    }
    case.top();
    if !refused {
        case.wrong("480 MiB in descriptors of other processes, and nothing was refused");
    }
    for at in held {
        cuMemFree_v2(at);
    }
    for mut keeper in keepers {
        drop(keeper.stdin.take());
        let _ = keeper.wait();
    }
    Ok(())
}

/// A process of the workload is killed with all that is free in its hands: all of it can be had again.
fn of_the_dead(case: &mut Case<'_>) -> Done {
    for _ in 0..3 {
        let mut child = Child::start(&["greedy"], &[])?;
        child.tell("take");
        let answer = child.hear()?;
        if answer != "refused 2" {
            case.wrong(format!("a sibling: {answer} instead of refused 2"));
        }
        case.top();
        child.kill();
        case.released("after a sibling was killed");
        let all = info().0 / GRANULE * GRANULE;
        let mut at = 0;
        let code = cuMemAlloc_v2(&mut at, all as usize);
        case.fits(code, all, "cuMemAlloc of what the dead had");
        case.top();
        cuMemFree_v2(at);
    }
    Ok(())
}

/// Both after a fork: the child has no CUDA, and takes nothing.
fn forked(case: &mut Case<'_>) -> Done {
    let mut pipe = [0; 2];
    // SAFETY: room for two descriptors.
    if unsafe { libc::pipe(pipe.as_mut_ptr()) } != 0 {
        return Err(Stop::Broken("pipe".to_owned()));
    }
    let mut own = 0;
    let half = info().0 / 2 / GRANULE * GRANULE;
    need(cuMemAlloc_v2(&mut own, half as usize), "cuMemAlloc")?;
    // SAFETY: the child calls the driver, which refuses, writes one number and ends without returning.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let (mut at, mut got) = (0, 0i32);
        for _ in 0..100 {
            if cuMemAlloc_v2(&mut at, 4 << 20).is_ok() {
                got += 1;
            }
        }
        let mut handle = 0;
        let properties = crate::types::AllocationProperties::device(0, 0);
        if crate::driver::cuMemCreate(&mut handle, 4 << 20, &properties, 0).is_ok() {
            got += 1;
        }
        let again = crate::driver::cuInit(0).0;
        let words = [got, again];
        // SAFETY: two numbers of four bytes; the process ends at once, and runs nothing of the parent's.
        unsafe {
            libc::write(pipe[1], words.as_ptr().cast(), 8);
            libc::usleep(50_000);
            libc::_exit(0);
        }
    }
    let mut words = [0i32; 2];
    // SAFETY: our descriptors, and room for eight bytes.
    unsafe {
        libc::close(pipe[1]);
        libc::read(pipe[0], words.as_mut_ptr().cast(), 8);
        libc::close(pipe[0]);
    }
    if words[0] != 0 {
        case.wrong(format!(
            "a forked child was given memory {} times",
            words[0]
        ));
    }
    if words[1] == 0 {
        case.wrong("a forked child of a program that uses CUDA could start it");
    }
    // Meanwhile the parent takes the rest, and no more.
    let rest = info().0 / GRANULE * GRANULE;
    match Classic.take(rest) {
        Ok(at) => {
            case.top();
            if let Ok(more) = Classic.take(GRANULE) {
                case.too_much(
                    crate::driver::Code::SUCCESS,
                    GRANULE,
                    "cuMemAlloc after a fork",
                );
                cuMemFree_v2(more);
            }
            cuMemFree_v2(at);
        }
        Err(code) => {
            case.fits(code, rest, "cuMemAlloc after a fork");
        }
    }
    let mut status = 0;
    // SAFETY: our child, and room for its status.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    cuMemFree_v2(own);
    Ok(())
}

/// For the late half of a process to make a context.
const LATE: std::time::Duration = std::time::Duration::from_millis(200);

/// A process forks before it starts CUDA, and both of it start it: two processes of one workload.
/// `late`: one of them after the other has taken all that there is.
fn fork_first(case: &mut Case<'_>, late: bool) -> Done {
    let words: &[&str] = if late { &["fork", "late"] } else { &["fork"] };
    let mut child = Child::start(words, &[])?;
    child.tell("take");
    let answer = child.hear()?;
    if answer != "refused 2" {
        case.wrong(format!(
            "a process that forked first: {answer} instead of refused 2"
        ));
    }
    if late {
        // Its context, if it got one.
        std::thread::sleep(LATE);
    }
    let mut held = Vec::new();
    while let Ok(at) = Classic.take(GRANULE) {
        held.push(at);
    }
    case.top();
    for at in held {
        cuMemFree_v2(at);
    }
    drop(child);
    Ok(())
}

/// Memory of several processes.
pub fn run(stage: &Stage) {
    stage.case("made by others that end, one workload", |case| {
        bequeathed(case, true)
    });
    stage.case("kept by a descriptor elsewhere", kept_by_another);
    stage.case("of the dead", of_the_dead);
}

/// Memory of other workloads.
pub fn between(stage: &Stage) {
    stage.case("made by other workloads that end", |case| {
        bequeathed(case, false)
    });
}

/// Forks.
pub fn forks(stage: &Stage) {
    stage.case("forked with memory", forked);
    stage.case("forked before CUDA", |case| fork_first(case, false));
    stage.case("forked before CUDA, one half late", |case| {
        fork_first(case, true)
    });
}
