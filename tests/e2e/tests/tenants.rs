//! What tenants cannot do to each other: read each other's host memory, write what the coordinator
//! wants of them, join or widen another's workload, or harm others by what they claim of themselves.

#[path = "support/programs.rs"]
mod programs;
#[path = "support/raw.rs"]
mod raw;

use std::fs::OpenOptions;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::mman::{ProtFlags, mprotect};
use nix::unistd::ftruncate;
use programs::compile;
use raw::{Mapping, Raw, Tenant, devices, register};
use spillway_protocol::Amount;
use spillway_protocol::message::{FromProcess, outcome};
use spillway_protocol::page::{OBSERVED_MAGIC, Observed, PAGE_BYTES, State, state};
use spillway_tests::{Daemon, MIB, Place, until};

const READ_WRITE: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);
const SEGMENT: u64 = 8 * MIB;
const SEGMENT_BYTES: usize = 8 << 20;

/// However a segment ends: its former owner, who kept the mapping, sees nothing of the next one.
#[test]
fn a_former_owner_of_host_memory_sees_nothing_of_the_next() {
    let place = Place::new("host segments").build();
    let daemon = place.daemon(&[]);
    let devices = devices(&daemon);
    let run_dir = place.run_dir();
    for released in [true, false] {
        let mut former = Tenant::join(
            &run_dir,
            register(devices.clone(), "former", Some(64 * MIB)),
        );
        assert_eq!(former.grow(SEGMENT, SEGMENT), outcome::GRANTED);
        let (id, file) = former.segment(SEGMENT);
        let kept = Mapping::new(&file, SEGMENT_BYTES, READ_WRITE).expect("maps");
        assert!(kept.is_all(0), "a segment comes empty");
        kept.fill(0xaa);
        if released {
            assert!(former.raw.send(&FromProcess::SegmentRelease { id }));
        } else {
            drop(former);
            daemon.await_gone("former");
        }
        until("the segment is emptied", || kept.is_all(0).then_some(()));
        let mut next = Tenant::join(&run_dir, register(devices.clone(), "next", Some(64 * MIB)));
        assert_eq!(next.grow(SEGMENT, SEGMENT), outcome::GRANTED);
        let (_, theirs) = next.segment(SEGMENT);
        let own = Mapping::new(&theirs, SEGMENT_BYTES, READ_WRITE).expect("maps");
        assert!(own.is_all(0), "released: {released}");
        own.fill(0xbb);
        assert!(kept.is_all(0), "released: {released}");
        kept.fill(0xcc);
        assert!(own.is_all(0xbb), "released: {released}");
    }
}

#[test]
fn a_process_cannot_write_its_desired_page() {
    let place = Place::new("desired page").build();
    let daemon = place.daemon(&[]);
    let limit = 64 * MIB;
    let tenant = Tenant::join(
        &place.run_dir(),
        register(devices(&daemon), "a", Some(limit)),
    );
    let file = &tenant.desired_file;
    assert!(Mapping::new(file, PAGE_BYTES, READ_WRITE).is_err());
    // SAFETY: the range is the tenant's own mapping; if this succeeded, only permissions changed.
    let changed = unsafe { mprotect(tenant.desired.0, PAGE_BYTES, READ_WRITE) };
    assert!(changed.is_err());
    let number = file.as_fd().as_raw_fd();
    let path = format!("/proc/self/fd/{number}");
    // Opened again for writing, as the owner of the file may do with a memfd.
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(mut again) => {
            assert!(again.write(&[0xff; 64]).is_err());
            assert!(Mapping::new(&again, PAGE_BYTES, READ_WRITE).is_err());
        }
        Err(why) => assert_eq!(why.kind(), std::io::ErrorKind::PermissionDenied),
    }
    for size in [0, 1, 8192] {
        assert!(ftruncate(file, size).is_err());
        assert!(ftruncate(&tenant.observed_file, size).is_err());
    }
    assert!(fcntl(file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).is_err());
    assert_eq!(tenant.desired().devices[0].limit.load(SeqCst), limit);
    // A page of a coordinator that still writes it.
    assert_eq!(daemon.state("a"), "resident");
}

#[test]
fn nobody_widens_a_workload() {
    let place = Place::new("limits").build();
    let daemon = place.daemon(&[]);
    let devices = devices(&daemon);
    let run_dir = place.run_dir();
    let limit = 64 * MIB;
    let of = |limit| register(devices.clone(), "a", limit);
    let mut first = Tenant::join(&run_dir, of(Some(limit)));
    // More of anything is refused, in words that name what to change.
    let text = Raw::connect(&run_dir).refused(of(Some(2 * limit)));
    assert!(
        text.contains("SPILLWAY_LIMIT") && text.contains("64 MiB"),
        "{text}"
    );
    let mut more = of(None);
    more.request = Some(Amount::Bytes(2 * limit));
    let text = Raw::connect(&run_dir).refused(more);
    assert!(text.contains("SPILLWAY_REQUEST"), "{text}");
    // Also from one who says that it was here before a restart.
    let page = own_page(2 * limit);
    let mut resumed = of(Some(2 * limit));
    resumed.resumes = 77;
    resumed.grants = vec![2 * limit];
    let refused = Tenant::try_join(&run_dir, resumed, &[page.as_raw_fd()]);
    assert!(refused.err().is_some_and(|text| text.contains("64 MiB")));
    // The same, or nothing, joins, and shares the limit.
    let mut second = Tenant::join(&run_dir, of(Some(limit)));
    let mut third = Tenant::join(&run_dir, of(None));
    assert_eq!(first.grow(40 * MIB, 0), outcome::GRANTED);
    use_all(&first, 40 * MIB);
    assert_eq!(second.grow(24 * MIB, 0), outcome::GRANTED);
    use_all(&second, 24 * MIB);
    assert_eq!(third.grow(2 * MIB, 0), outcome::LIMIT);
    // One that claims to come back with grants gets no more than is left of the limit.
    let mut resumed = of(None);
    resumed.resumes = 77;
    resumed.grants = vec![limit];
    if let Ok(fourth) = Tenant::try_join(&run_dir, resumed, &[page.as_raw_fd()]) {
        let granted: u64 = [&first, &second, &third, &fourth]
            .iter()
            .map(|tenant| tenant.desired().devices[0].grant.load(SeqCst))
            .sum();
        assert!(granted <= limit, "{granted} bytes granted of {limit}");
    }
}

/// A guarantee is not to be had by saying that one had it already.
#[test]
fn claiming_to_come_back_is_no_way_around_admission() {
    let place = Place::new("admission").build();
    let daemon = place.daemon(&[]);
    let devices = devices(&daemon);
    let run_dir = place.run_dir();
    let room = daemon.status()["devices"][0]["room_bytes"]
        .as_u64()
        .expect("room");
    let mut owner = register(devices.clone(), "owner", None);
    owner.request = Some(Amount::Bytes(room / 4 * 3));
    let mut owner = Tenant::join(&run_dir, owner);
    let mut greedy = register(devices, "greedy", None);
    greedy.request = Some(Amount::Bytes(room / 2));
    let text = Raw::connect(&run_dir).refused(greedy.clone());
    assert!(text.contains("MiB"), "names the numbers: {text}");
    greedy.resumes = 77;
    greedy.grants = vec![room / 2];
    let page = own_page(room / 2);
    // It may be let in, since it says that it holds memory; but nothing is guaranteed to it.
    let joined = Tenant::try_join(&run_dir, greedy, &[page.as_raw_fd()]);
    let requests: u64 = daemon.status()["workloads"]
        .as_array()
        .expect("workloads")
        .iter()
        .map(|workload| {
            workload["devices"][0]["request_bytes"]
                .as_u64()
                .expect("a number")
        })
        .sum();
    assert!(requests <= room, "{requests} bytes guaranteed of {room}");
    assert_eq!(daemon.workload("owner")["request_bytes"], room / 4 * 3);
    if let Some(greedy) = daemon.find("greedy") {
        assert_eq!(greedy["request_bytes"], 0);
    }
    // What the other claims to hold is there to be counted, and gone with it.
    drop(joined);
    daemon.await_gone("greedy");
    let wanted = room / 4 * 3 / (2 * MIB) * (2 * MIB);
    until("the owner has its request", || {
        (owner.grow(wanted, 0) == outcome::GRANTED).then_some(())
    });
}

/// What a process publishes about itself may be anything; others are served, figures stay sane.
#[test]
fn lies_harm_nobody_else() {
    let place = Place::new("lies").build();
    if !programs::have("cc", "lies") {
        return;
    }
    compile(&place, "host.c", "host", &[]);
    let daemon = place.daemon(&["--drain-deadline", "300ms", "--idle-after", "50ms"]);
    let mut honest = place
        .program(place.dir().join("host"))
        .args("holds 128")
        .workload("honest")
        .request("256MiB")
        .start();
    assert_eq!(honest.line(), "ready?");
    let mut liar = Tenant::join(
        &place.run_dir(),
        register(devices(&daemon), "liar", Some(128 * MIB)),
    );
    assert_eq!(liar.grow(64 * MIB, 64 * MIB), outcome::GRANTED);
    let mut seed: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut random = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let capacity = daemon.status()["devices"][0]["capacity_bytes"]
        .as_u64()
        .expect("capacity");
    let begun = Instant::now();
    let mut round = 0;
    while begun.elapsed() < Duration::from_secs(6) {
        round += 1;
        let page = liar.observed();
        let device = &page.devices[0];
        let words: [&AtomicU64; 20] = [
            &page.state,
            &page.wants,
            &page.calls,
            &page.in_flight,
            &page.last_active_ns,
            &page.host_bytes,
            &page.pageable,
            &page.unswappable,
            &page.changes_begun,
            &page.changes_ended,
            &page.bytes_out,
            &page.bytes_in,
            &page.swaps_out,
            &page.swaps_in,
            &page.blocked_ns,
            &page.refused,
            &device.used,
            &device.resident,
            &device.pinned,
            &device.demand,
        ];
        for word in words {
            let value = match random() % 5 {
                0 => u64::MAX,
                1 => 0,
                2 => i64::MIN.cast_unsigned(),
                3 => random() >> (random() % 64),
                // Plausible: an answer to whatever epoch may be wanted, with any state.
                _ => State {
                    epoch: random() % 32,
                    code: u8::try_from(random() % 12).unwrap_or(state::EVICTED),
                }
                .pack(),
            };
            word.store(value, SeqCst);
        }
        liar.raw.send(&FromProcess::Wake);
        if round % 40 == 0 {
            // Evictions of the liar may do anything but block the honest one's.
            let name = if random() % 2 == 0 {
                "evict"
            } else {
                "restore"
            };
            let target = format!("/v1/workloads/liar/{name}?timeout=0.2");
            let _ = daemon.try_request("POST", &target, Duration::from_secs(10));
            daemon.evict_when_idle("honest");
            assert_eq!(honest.ask("check"), "bytes right");
            sane(&daemon, capacity);
        }
        while nix::poll::poll(
            &mut [nix::poll::PollFd::new(
                liar.raw.0.as_fd(),
                nix::poll::PollFlags::POLLIN,
            )],
            nix::poll::PollTimeout::ZERO,
        )
        .is_ok_and(|n| n > 0)
        {
            if liar.raw.receive().is_none() {
                // Thrown out: as good an end as any.
                liar = Tenant::join(
                    &place.run_dir(),
                    register(devices(&daemon), "liar", Some(128 * MIB)),
                );
            }
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    // What it said about itself did not push out what was said of others.
    let told = daemon.events_of("liar", "swappable").len();
    assert!(told <= 40, "{told} events of the liar's own making");
    assert_eq!(honest.ask("grow 32"), "grown");
    assert_eq!(honest.ask("check"), "bytes right");
    drop(liar);
    daemon.await_gone("liar");
    until("the liar's share is free", || {
        let granted = daemon.status()["devices"][0]["granted_bytes"].as_u64()?;
        let honest = daemon.workload("honest")["devices"][0]["grant_bytes"].as_u64()?;
        let overhead = daemon.workload("honest")["devices"][0]["overhead_bytes"].as_u64()?;
        (granted <= honest + overhead).then_some(())
    });
}

/// Figures that an operator sees stay within the device, and metrics are numbers.
fn sane(daemon: &Daemon<'_>, capacity: u64) {
    let status = daemon.status();
    let device = &status["devices"][0];
    for name in ["granted_bytes", "free_bytes", "room_bytes"] {
        assert!(
            device[name].as_u64().is_some_and(|n| n <= capacity),
            "{device}"
        );
    }
    for workload in status["workloads"].as_array().expect("workloads") {
        for name in [
            "used_bytes",
            "resident_bytes",
            "pinned_bytes",
            "grant_bytes",
        ] {
            let bytes = &workload["devices"][0][name];
            assert!(bytes.as_u64().is_some_and(|n| n <= capacity), "{workload}");
        }
    }
    let metrics = daemon.request("GET", "/metrics");
    assert_eq!(metrics.status, 200);
    for line in metrics.body.lines().filter(|line| !line.starts_with('#')) {
        let value = line.rsplit(' ').next().unwrap_or_default();
        assert!(value.parse::<f64>().is_ok_and(f64::is_finite), "{line}");
    }
}

/// The process counts as using all that it was granted.
fn use_all(tenant: &Tenant, bytes: u64) {
    let device = &tenant.observed().devices[0];
    device.used.store(bytes, SeqCst);
    device.resident.store(bytes, SeqCst);
    device.pinned.store(bytes, SeqCst);
}

/// A page as a process that comes back brings it.
fn own_page(used: u64) -> std::os::fd::OwnedFd {
    let file = memfd(PAGE_BYTES);
    let page = Mapping::new(&file, PAGE_BYTES, READ_WRITE).expect("maps");
    // SAFETY: a page-aligned mapping of at least that size, made of atomics.
    let observed = unsafe { page.0.cast::<Observed>().as_ref() };
    observed.magic.store(OBSERVED_MAGIC, SeqCst);
    observed
        .version
        .store(u64::from(spillway_protocol::PROTOCOL_VERSION), SeqCst);
    observed.devices[0].used.store(used, SeqCst);
    observed.devices[0].resident.store(used, SeqCst);
    observed.devices[0].pinned.store(used, SeqCst);
    file
}

fn memfd(bytes: usize) -> std::os::fd::OwnedFd {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = memfd_create("page", flags).expect("a memfd");
    ftruncate(&file, i64::try_from(bytes).expect("fits")).expect("a size");
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).expect("seals");
    file
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// The name of a workload is its first user's.
#[test]
fn another_user_cannot_join() {
    if !is_root()
        || !programs::have("setpriv", "another user")
        || !programs::have("cc", "another user")
    {
        if !is_root() {
            eprintln!("skipped: another user: not root");
        }
        return;
    }
    let place = Place::new("another user").world().build();
    compile(&place, "host.c", "host", &[]);
    let daemon = place.daemon(&[]);
    let _first = Tenant::join(&place.run_dir(), register(devices(&daemon), "a", None));
    let mut command = place.command("setpriv");
    command
        .args([
            "--reuid",
            "65534",
            "--regid",
            "65534",
            "--clear-groups",
            "--",
        ])
        .arg(place.dir().join("host"))
        .arg("init")
        .env("LD_PRELOAD", place.library())
        .env("SPILLWAY_WORKLOAD", "a");
    let shot = place.run(command);
    assert!(
        shot.stdout.starts_with("init ") && shot.stdout != "init 0\n",
        "{shot:?}"
    );
    assert!(
        shot.stderr.contains("user") && shot.stderr.contains("SPILLWAY_WORKLOAD"),
        "{shot:?}"
    );
    let processes = daemon.workload("a")["processes"].clone();
    assert_eq!(processes.as_array().map(Vec::len), Some(1));
}

/// And its first container's.
#[test]
fn another_control_group_cannot_join() {
    let name = format!("spillway-test-{}", std::process::id());
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let unified = mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            Some((fields.next()?, fields.next()?))
        })
        .find_map(|(at, kind)| (kind == "cgroup2" || kind == "cgroup").then(|| at.to_owned()));
    let Some(group) = unified.map(|at| std::path::Path::new(&at).join(&name)) else {
        eprintln!("skipped: another control group: none is mounted");
        return;
    };
    if let Err(why) = std::fs::create_dir(&group) {
        eprintln!("skipped: another control group: {}: {why}", group.display());
        return;
    }
    let outcome = std::panic::catch_unwind(|| {
        let place = Place::new("another control group").build();
        if !programs::have("cc", "another control group") {
            return;
        }
        compile(&place, "host.c", "host", &[]);
        let daemon = place.daemon(&[]);
        let _first = Tenant::join(&place.run_dir(), register(devices(&daemon), "a", None));
        let mut command = place.command("/bin/sh");
        command
            .args([
                "-c",
                "echo $$ >\"$1\"/cgroup.procs && exec env LD_PRELOAD=\"$2\" \"$3\" init",
                "sh",
            ])
            .arg(&group)
            .arg(place.library())
            .arg(place.dir().join("host"))
            .env("SPILLWAY_WORKLOAD", "a");
        let shot = place.run(command);
        if shot.code == Some(2) && shot.stdout.is_empty() {
            eprintln!("skipped: another control group: {}", shot.stderr.trim());
            return;
        }
        assert!(
            shot.stdout.starts_with("init ") && shot.stdout != "init 0\n",
            "{shot:?}"
        );
        assert!(shot.stderr.contains("control group"), "{shot:?}");
    });
    // A group is gone once its last process is.
    until("the group is removed", || std::fs::remove_dir(&group).ok());
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
}
