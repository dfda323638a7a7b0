//! What cannot be read, or is not what it should be: a clear error that names what to change, in
//! bounded time, and nothing lost for anybody else.
//!
//! HTTP and the command line are tested one by one in `coordinator/tests`; here against the real
//! daemon while others are served.

#[path = "support/programs.rs"]
mod programs;
#[path = "support/raw.rs"]
mod raw;

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept, bind, listen, socket,
};
use programs::{compile, have};
use raw::{Raw, Tenant, devices, register};
use spillway_protocol::message::{FromProcess, ToProcess};
use spillway_protocol::names::session_socket;
use spillway_tests::{MIB, Place, Shot, send_raw};

const LONG: Duration = Duration::from_secs(30);

fn place(name: &str) -> Option<Place> {
    if !have("cc", name) {
        return None;
    }
    let place = Place::new(name).build();
    compile(&place, "host.c", "host", &[]);
    Some(place)
}

/// `cuInit` under Spillway with these settings.
fn init(place: &Place, vars: &[(&str, &str)]) -> Shot {
    let mut command = place.command(place.dir().join("host"));
    command
        .arg("init")
        .env("LD_PRELOAD", place.library())
        .envs(vars.iter().copied());
    place.run(command)
}

#[test]
fn a_setting_that_cannot_be_read_is_named_and_cuda_refused() {
    let Some(place) = place("settings") else {
        return;
    };
    let cases: [&[(&str, &str)]; 15] = [
        &[("SPILLWAY_LIMIT", "24")],
        &[("SPILLWAY_LIMIT", "lots")],
        &[("SPILLWAY_LIMIT", "1e9")],
        &[("SPILLWAY_LIMIT", "0GiB")],
        &[("SPILLWAY_LIMIT", "150%")],
        &[("SPILLWAY_REQUEST", "-1GiB")],
        &[("SPILLWAY_REQUEST", "12 parsecs")],
        &[("SPILLWAY_REQUEST", "2GiB"), ("SPILLWAY_LIMIT", "1GiB")],
        &[("SPILLWAY_REQUEST", "60%"), ("SPILLWAY_LIMIT", "0.5")],
        &[("NVIDIA_GPU_MEMORY_LIMIT", "1GiB")],
        &[("CUDA_DEVICE_MEMORY_LIMIT_0", "x")],
        &[("SPILLWAY_PRIORITY", "high")],
        &[("SPILLWAY_SWAP", "maybe")],
        &[("SPILLWAY_DISABLE", "yes")],
        &[("SPILLWAY_WORKLOAD", "two words")],
    ];
    // With a coordinator and without one: never a silent "unlimited".
    for with in [true, false] {
        let daemon = with.then(|| place.daemon(&[]));
        for vars in cases {
            let shot = init(&place, vars);
            assert_eq!(shot.code, Some(0), "{vars:?}: {shot:?}");
            assert_ne!(shot.stdout, "init 0\n", "{vars:?} was let through");
            assert_eq!(shot.stderr.lines().count(), 1, "{vars:?}: {shot:?}");
            for (name, value) in vars {
                assert!(shot.stderr.contains(name), "{name}: {shot:?}");
                assert!(shot.stderr.contains(value), "{value}: {shot:?}");
            }
        }
        if let Some(daemon) = daemon {
            let workloads = daemon.get("/v1/workloads")["workloads"].clone();
            assert_eq!(workloads.as_array().map(Vec::len), Some(0), "{workloads}");
        }
    }
}

#[test]
fn a_request_that_the_device_has_not_is_refused_with_the_numbers() {
    let Some(place) = place("numbers") else {
        return;
    };
    let daemon = place.daemon(&["--capacity", "512MiB", "--reserve", "0"]);
    let mut first = place
        .program(place.dir().join("host"))
        .args("holds 64")
        .workload("first")
        .request("384MiB")
        .start();
    assert_eq!(first.line(), "ready?");
    for request in ["256MiB", "8GiB"] {
        let shot = init(&place, &[("SPILLWAY_REQUEST", request)]);
        assert_ne!(shot.stdout, "init 0\n");
        assert_eq!(shot.stderr.lines().count(), 1, "{shot:?}");
        assert!(shot.stderr.contains("SPILLWAY_REQUEST"), "{shot:?}");
        assert!(shot.stderr.contains("MiB"), "{shot:?}");
    }
    assert_eq!(
        init(&place, &[("SPILLWAY_REQUEST", "64MiB")]).stdout,
        "init 0\n"
    );
    assert_eq!(first.ask("check"), "bytes right");
    assert_eq!(daemon.state("first"), "resident");
}

#[test]
fn what_nobody_knows_is_said_to_be_unknown() {
    let place = Place::new("unknown").build();
    let daemon = place.daemon(&[]);
    for verb in ["evict", "restore"] {
        let shot = place.spillway(&[verb, "nobody"]);
        assert!(shot.code.is_some_and(|code| code != 0), "{shot:?}");
        assert!(shot.stderr.contains("nobody"), "{shot:?}");
        let answer = daemon.operate("nobody", verb);
        assert_eq!(answer.status, 404);
        assert!(answer.error().contains("nobody"), "{}", answer.body);
    }
    let shot = place.spillway(&["run", "--limit", "24", "--", "true"]);
    assert!(shot.code.is_some_and(|code| code != 0), "{shot:?}");
    assert!(shot.stderr.contains("24GiB or 24%"), "{shot:?}");
    let shot = place.spillway(&["run", "--", "/no/such/program"]);
    assert_eq!(shot.code, Some(127), "{shot:?}");
    assert!(shot.stderr.contains("/no/such/program"), "{shot:?}");
}

/// Requests that are none, to the daemon that serves a process meanwhile.
#[test]
fn malformed_http_harms_nobody() {
    let place = Place::new("malformed HTTP").build();
    let daemon = place.daemon(&[]);
    let mut tenant = Tenant::join(
        &place.run_dir(),
        register(devices(&daemon), "a", Some(64 * MIB)),
    );
    let socket = spillway_protocol::names::api_socket(&place.run_dir());
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(1 << 20));
    let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(10_000));
    let requests: [&[u8]; 10] = [
        b"\0\x01\x02\xff\xfe\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /v1/status\r\n\r\n",
        b"GET /v1/status HTTP/9.9\r\n\r\n",
        b"POST /v1/workloads/a/evict HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/workloads/a/evict HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"POST /v1/workloads/a/evict HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /v1/workloads/%zz HTTP/1.1\r\nHost: x\r\n\r\n",
        long.as_bytes(),
        many.as_bytes(),
    ];
    for request in requests {
        let shown = String::from_utf8_lossy(&request[..request.len().min(60)]).into_owned();
        // The daemon may close before it has read all; what it said before is enough.
        if let Ok(answer) = send_raw(&socket, request, Duration::from_secs(15)) {
            let answer = String::from_utf8_lossy(&answer).into_owned();
            let status = answer.split(' ').nth(1).unwrap_or_default();
            assert!(
                status.starts_with('4') || status.starts_with('5'),
                "{shown}: {answer}"
            );
        }
    }
    assert_eq!(daemon.state("a"), "resident");
    assert_eq!(
        tenant.grow(8 * MIB, 0),
        spillway_protocol::message::outcome::GRANTED
    );
}

/// Every message, cut at every byte, before and after registration; and bytes that are no message.
#[test]
fn truncated_session_messages_end_that_session_alone() {
    let place = Place::new("truncated").build();
    let daemon = place.daemon(&[]);
    let devices = devices(&daemon);
    let run_dir = place.run_dir();
    let mut other = Tenant::join(&run_dir, register(devices.clone(), "other", Some(64 * MIB)));
    let whole = FromProcess::Register(register(devices.clone(), "cut", None)).encode();
    for end in 0..whole.len() {
        let raw = Raw::connect(&run_dir);
        let _ = raw.send_bytes(&whole[..end], &[]);
        ends_refused(&raw, end > 0);
    }
    let mut trailing = whole.clone();
    trailing.push(0);
    let huge = vec![1; 100_000];
    for packet in [&trailing[..], &huge[..], &[0xff; 8192]] {
        let raw = Raw::connect(&run_dir);
        if raw.send_bytes(packet, &[]) {
            ends_refused(&raw, true);
        }
    }
    let messages = [
        FromProcess::Grow {
            ticket: 1,
            device: 0,
            bytes: MIB,
            pageable: 0,
            no_wait: 1,
        },
        FromProcess::Segment {
            ticket: 1,
            bytes: 2 * MIB,
        },
        FromProcess::SegmentRelease { id: 1 },
        FromProcess::Refresh {
            ticket: 1,
            measure: 0,
        },
        FromProcess::Note {
            text: "text".to_owned(),
        },
    ];
    for message in messages {
        let whole = message.encode();
        for end in 1..whole.len() {
            let tenant = Tenant::join(&run_dir, register(devices.clone(), "", None));
            let _ = tenant.raw.send_bytes(&whole[..end], &[]);
            ends_refused(&tenant.raw, true);
        }
    }
    // A descriptor where none belongs, and none where one does.
    let tenant = Tenant::join(&run_dir, register(devices.clone(), "", None));
    let null = std::fs::File::open("/dev/null").expect("opens");
    let mut resumes = register(devices, "back", None);
    resumes.resumes = 5;
    let text = Raw::connect(&run_dir).refused(resumes.clone());
    assert!(text.contains("descriptor"), "{text}");
    let refused = Tenant::try_join(&run_dir, resumes, &[null.as_raw_fd()]);
    assert!(refused.is_err(), "/dev/null is no page");
    drop(tenant);
    assert_eq!(
        other.grow(8 * MIB, 0),
        spillway_protocol::message::outcome::GRANTED
    );
    assert_eq!(daemon.state("other"), "resident");
    daemon.await_gone("cut");
}

/// A coordinator that ends a session empties its host memory, too. A process whose bytes were there
/// ends with a word about it: zeros would be worse.
#[test]
fn a_session_ended_while_swapped_out_never_yields_wrong_bytes() {
    let Some(place) = place("ended while swapped out") else {
        return;
    };
    let daemon = place.daemon(&[]);
    let hold = |name: &str| {
        let launch = place.program(place.dir().join("host")).args("holds 64");
        launch.workload(name).start()
    };
    let (mut client, mut other) = (hold("client"), hold("other"));
    assert_eq!(client.line(), "ready?");
    assert_eq!(other.line(), "ready?");
    let Some(socket) = socket_of(client.pid()) else {
        eprintln!("skipped: ended while swapped out: pidfd_getfd is not allowed here");
        return;
    };
    daemon.evict_when_idle("other");
    daemon.evict_when_idle("client");
    assert!(Raw(socket).send_bytes(b"no message", &[]));
    spillway_tests::until("the session is ended", || {
        let left = daemon.events_of("client", "left");
        (!left.is_empty()).then_some(())
    });
    client.send("check");
    let said = client.try_line(LONG);
    assert!(said.is_none(), "it went on: {said:?}");
    assert_eq!(client.wait(LONG), None, "{}", client.stderr());
    assert!(
        client.stderr().contains("it is lost"),
        "{}",
        client.stderr()
    );
    assert_eq!(other.ask("check"), "bytes right");
}

/// A copy of the one socket that a process holds.
fn socket_of(pid: i32) -> Option<OwnedFd> {
    let number = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .expect("its descriptors")
        .flatten()
        .find(|entry| {
            std::fs::read_link(entry.path())
                .is_ok_and(|to| to.to_string_lossy().starts_with("socket:"))
        })
        .and_then(|entry| entry.file_name().to_str()?.parse::<i64>().ok())
        .expect("a socket");
    // SAFETY: both take numbers alone; the new descriptors are ours.
    unsafe {
        let process = libc::syscall(libc::SYS_pidfd_open, pid, 0);
        let process = OwnedFd::from_raw_fd(i32::try_from(process).ok().filter(|fd| *fd >= 0)?);
        let got = libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0);
        let got = i32::try_from(got).ok().filter(|fd| *fd >= 0)?;
        Some(OwnedFd::from_raw_fd(got))
    }
}

/// The other side says why, or just closes; soon.
fn ends_refused(raw: &Raw, text: bool) {
    match raw.answer() {
        Some((ToProcess::Refused { text }, _)) => {
            assert!(!text.is_empty());
            assert!(raw.answer().is_none(), "it goes on after a refusal");
        }
        None => {}
        // An answer to a message that was whole after all would be a wrong answer here.
        Some((other, _)) => panic!("expected a refusal (text: {text}), got {other:?}"),
    }
}

/// Whatever stands where the session socket should be: the program runs as without a coordinator, is
/// told so in one line with the path and what to do, and does not wait long.
#[test]
fn a_socket_that_is_missing_or_not_ours_is_said_and_not_waited_for() {
    let Some(place) = place("foreign sockets") else {
        return;
    };
    let path = session_socket(&place.run_dir());
    runs_alone(&place, "nothing there");
    std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
    runs_alone(&place, "no socket");
    std::fs::write(&path, "not a socket").expect("a file");
    runs_alone(&place, "a plain file");
    std::fs::remove_file(&path).expect("removed");
    std::fs::create_dir(&path).expect("a folder");
    runs_alone(&place, "a folder");
    std::fs::remove_dir(&path).expect("removed");
    drop(std::os::unix::net::UnixListener::bind(&path).expect("a listener"));
    runs_alone(&place, "a socket that nobody listens on");
    std::fs::remove_file(&path).expect("removed");
    let stream = std::os::unix::net::UnixListener::bind(&path).expect("a listener");
    runs_alone(&place, "another kind of socket");
    drop(stream);
    std::fs::remove_file(&path).expect("removed");

    let welcome = ToProcess::Welcome {
        version: 1,
        instance: 7,
        workload: "x".to_owned(),
    };
    let null = std::fs::File::open("/dev/null").expect("opens");
    let zero = std::fs::File::open("/dev/zero").expect("opens");
    let answers: [(&str, Foreign<'_>); 6] = [
        ("closes at once", Foreign::Close),
        ("sends garbage", Foreign::Send(b"garbage".to_vec(), &[])),
        (
            "sends nothing that fits",
            Foreign::Send(ToProcess::Wake.encode(), &[]),
        ),
        (
            "welcomes without pages",
            Foreign::Send(welcome.encode(), &[]),
        ),
        (
            "welcomes with wrong files",
            Foreign::Send(welcome.encode(), &[&null, &zero]),
        ),
        ("never answers", Foreign::Silence),
    ];
    for (what, answer) in answers {
        let server = Server::start(&path, answer);
        runs_alone(&place, what);
        drop(server);
    }
    // A listener that does not accept, its queue full: even connecting waits.
    let listener = listener(&path, 0);
    let full: Vec<_> = (0..2).filter_map(|_| try_connect(&path)).collect();
    assert!(!full.is_empty());
    runs_alone(&place, "never accepts");
    drop((listener, full));
}

fn runs_alone(place: &Place, what: &str) {
    let begun = Instant::now();
    let launch = place.program(place.dir().join("host")).args("works");
    let (code, stdout, stderr) = launch.limit("256MiB").finish(LONG);
    assert_eq!(
        (code, stdout.as_str()),
        (Some(0), "it: works"),
        "{what}: {stderr}"
    );
    assert_eq!(stderr.lines().count(), 1, "{what}: {stderr}");
    let path = session_socket(&place.run_dir());
    assert!(
        stderr.contains(&path.display().to_string()),
        "{what}: {stderr}"
    );
    assert!(stderr.contains("Start spillwayd"), "{what}: {stderr}");
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(16), "{what}: took {took:?}");
}

/// What a listener that is not a coordinator does with a connection.
enum Foreign<'a> {
    Close,
    Silence,
    Send(Vec<u8>, &'a [&'a std::fs::File]),
}

struct Server {
    path: std::path::PathBuf,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Server {
    fn start(path: &Path, answer: Foreign<'_>) -> Self {
        let listener = listener(path, 8);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let (bytes, close, files) = match answer {
            Foreign::Close => (None, true, Vec::new()),
            Foreign::Silence => (None, false, Vec::new()),
            Foreign::Send(bytes, files) => {
                let copy = |file: &&std::fs::File| file.try_clone().expect("a copy");
                (Some(bytes), false, files.iter().map(copy).collect())
            }
        };
        let thread = std::thread::spawn(move || {
            let mut kept = Vec::new();
            while let Ok(raw) = accept(listener.as_raw_fd()) {
                // SAFETY: the kernel has just made this descriptor for us.
                let peer = Raw(unsafe { OwnedFd::from_raw_fd(raw) });
                if stopped.load(SeqCst) {
                    return;
                }
                if let Some(bytes) = &bytes {
                    let numbers: Vec<_> = files.iter().map(AsRawFd::as_raw_fd).collect();
                    peer.send_bytes(bytes, &numbers);
                }
                if !close {
                    kept.push(peer);
                }
            }
        });
        Self {
            path: path.to_owned(),
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, SeqCst);
        let _ = try_connect(&self.path);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = std::fs::remove_file(&self.path);
    }
}

fn unix_socket(flags: SockFlag) -> OwnedFd {
    let flags = flags | SockFlag::SOCK_CLOEXEC;
    socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).expect("a socket")
}

fn listener(path: &Path, backlog: i32) -> OwnedFd {
    let fd = unix_socket(SockFlag::empty());
    let address = UnixAddr::new(path).expect("a short path");
    bind(fd.as_raw_fd(), &address).expect("binds");
    listen(&fd, Backlog::new(backlog).expect("a backlog")).expect("listens");
    fd
}

fn try_connect(path: &Path) -> Option<OwnedFd> {
    let fd = unix_socket(SockFlag::SOCK_NONBLOCK);
    let address = UnixAddr::new(path).expect("a short path");
    nix::sys::socket::connect(fd.as_raw_fd(), &address).ok()?;
    Some(fd)
}
