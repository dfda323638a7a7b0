//! The machine that processes share: how it is made, how its engines and memory are divided, what
//! deaths and faults do to it. What a real driver does as well is in `tests/conformance`.
//!
//! Each test starts processes of this same binary, which run one of the `part_*` functions.

use std::ffi::{CString, c_char, c_void};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const PTX: &str = concat!(include_str!("../../kernels/spillway.ptx"), "\0");
const MIB: usize = 1 << 20;

/// The library beside this test. Cargo does not build it for `cargo test`: an old one would be
/// tested in silence, so that is refused.
fn library() -> PathBuf {
    let me = std::env::current_exe().expect("current_exe");
    let deps = me.parent().expect("deps");
    let candidates = [
        deps.to_path_buf(),
        deps.parent().expect("target").to_path_buf(),
    ];
    let library = candidates
        .iter()
        .map(|dir| dir.join("libcuda.so"))
        .find(|p| p.exists());
    let library = library.expect("no libcuda.so: cargo build -p spillway-simulator-cuda first");
    let changed = |path: &Path| std::fs::metadata(path).and_then(|m| m.modified()).ok();
    let sources = ["src", "../core/src"].map(|dir| Path::new(env!("CARGO_MANIFEST_DIR")).join(dir));
    let files = sources
        .iter()
        .filter_map(|dir| std::fs::read_dir(dir).ok())
        .flatten()
        .flatten();
    let newest = files.filter_map(|file| changed(&file.path())).max();
    assert!(
        changed(&library) >= newest,
        "libcuda.so is older than its sources: cargo build -p spillway-simulator-cuda first"
    );
    library
}

fn symbol(name: &str) -> *mut c_void {
    let library = CString::new(library().as_os_str().as_encoded_bytes()).expect("path");
    let name = CString::new(name).expect("name");
    // SAFETY: opening a library that has no constructors, and looking up a name in it.
    unsafe {
        let handle = libc::dlopen(library.as_ptr(), libc::RTLD_NOW);
        assert!(!handle.is_null(), "dlopen");
        let found = libc::dlsym(handle, name.as_ptr());
        assert!(!found.is_null(), "{name:?}");
        found
    }
}

/// Calls a driver function with integers and pointers, each as one word: the driver's own
/// parameters are no wider, and narrower ones lie in the low bits.
fn call<const N: usize>(name: &str, args: [usize; N]) -> u32 {
    let address = symbol(name);
    let mut a = [0; 11];
    a[..N].copy_from_slice(&args);
    type Function = extern "C" fn(
        usize,
        usize,
        usize,
        usize,
        usize,
        usize,
        usize,
        usize,
        usize,
        usize,
        usize,
    ) -> u32;
    // SAFETY: a function of the C calling convention that reads at most the first N words, which
    // are valid for it; more than it reads does no harm.
    let function: Function = unsafe { std::mem::transmute(address) };
    function(
        a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10],
    )
}

macro_rules! cu {
    ($name:ident($($arg:expr),*)) => { call(stringify!($name), [$($arg as usize),*]) };
}

macro_rules! ok {
    ($name:ident($($arg:expr),*)) => { assert_eq!(cu!($name($($arg),*)), 0, stringify!($name)) };
}

fn start() {
    ok!(cuInit(0));
    let mut context = 0_usize;
    ok!(cuCtxCreate_v2(&raw mut context, 0, 0));
}

fn free_bytes() -> usize {
    let (mut free, mut total) = (0_usize, 0_usize);
    ok!(cuMemGetInfo_v2(&raw mut free, &raw mut total));
    free
}

fn alloc(bytes: usize) -> usize {
    let mut address = 0_usize;
    ok!(cuMemAlloc_v2(&raw mut address, bytes));
    address
}

fn function(name: &str) -> usize {
    let (mut module, mut function) = (0_usize, 0_usize);
    let name = CString::new(name).expect("name");
    ok!(cuModuleLoadData(&raw mut module, PTX.as_ptr()));
    ok!(cuModuleGetFunction(
        &raw mut function,
        module,
        name.as_ptr()
    ));
    function
}

fn spin(function: usize, ns: u64) {
    let params = [(&raw const ns).cast::<c_void>()];
    let null = std::ptr::null::<c_char>();
    ok!(cuLaunchKernel(
        function,
        1,
        1,
        1,
        1,
        1,
        1,
        0,
        0,
        params.as_ptr(),
        null
    ));
    ok!(cuCtxSynchronize());
}

/// A machine in a directory of its own.
struct Machine(tempfile::TempDir, Vec<(&'static str, &'static str)>);

impl Machine {
    fn new(variables: &[(&'static str, &'static str)]) -> Self {
        Self(tempfile::tempdir().expect("tempdir"), variables.to_vec())
    }

    fn dir(&self) -> &Path {
        self.0.path()
    }

    fn command(&self, part: &str) -> Command {
        let mut command = Command::new(std::env::current_exe().expect("current_exe"));
        command
            .args(["--exact", part, "--ignored", "--nocapture"])
            .env("SPILLWAY_SIM_DIR", self.dir().join("sim"));
        for (name, value) in &self.1 {
            command.env(name, value);
        }
        command
    }

    /// Runs a part to its end.
    fn run(&self, part: &str) {
        let output = self.command(part).output().expect("spawn");
        let said = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(output.status.success(), "{part}: {said}");
    }

    /// Starts a part and waits until it says that it is ready, by making a file.
    fn hold(&self, part: &str) -> Child {
        let ready = self.dir().join("ready");
        let child = self
            .command(part)
            .env("READY", &ready)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("spawn");
        wait_until("a part that is ready", || ready.exists());
        std::fs::remove_file(ready).expect("ready");
        child
    }
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(
            began.elapsed() < Duration::from_secs(20),
            "waited in vain for {what}"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn ready_and_wait() {
    std::fs::write(std::env::var_os("READY").expect("READY"), "").expect("ready");
    std::thread::sleep(Duration::from_secs(60));
}

#[test]
#[ignore = "run by another test"]
fn part_holds_512_mib() {
    start();
    alloc(512 * MIB);
    ready_and_wait();
}

#[test]
#[ignore = "run by another test"]
fn part_sees_512_mib_come_back() {
    start();
    wait_until("the memory", || free_bytes() >= 900 * MIB);
    // All of it can be had, not only seen.
    let mut address = 0_usize;
    wait_until("an allocation", || {
        cu!(cuMemAlloc_v2(&raw mut address, 900 * MIB)) == 0
    });
}

#[test]
fn a_killed_process_gives_its_memory_back() {
    let machine = Machine::new(&[("SPILLWAY_SIM_MEMORY", "1GiB")]);
    let mut holder = machine.hold("part_holds_512_mib");
    machine.run("part_sees_half_used");
    holder.kill().expect("kill");
    holder.wait().expect("wait");
    machine.run("part_sees_512_mib_come_back");
}

#[test]
#[ignore = "run by another test"]
fn part_sees_half_used() {
    start();
    let free = free_bytes();
    assert!((400 * MIB..=512 * MIB).contains(&free), "free {free}");
    let mut address = 0_usize;
    assert_eq!(cu!(cuMemAlloc_v2(&raw mut address, 512 * MIB)), 2);
}

#[test]
#[ignore = "run by another test"]
fn part_spins() {
    start();
    let spin_ns = function("spin_ns");
    spin(spin_ns, 1);
    spin(spin_ns, 300_000_000);
}

#[test]
fn kernels_of_two_processes_share_the_engine() {
    let machine = Machine::new(&[]);
    machine.run("part_spins");
    let began = Instant::now();
    let mut both =
        [machine.command("part_spins"), machine.command("part_spins")].map(|mut command| {
            command.stdout(Stdio::null());
            command.spawn().expect("spawn")
        });
    for child in &mut both {
        assert!(child.wait().expect("wait").success());
    }
    let took = began.elapsed();
    assert!(
        took >= Duration::from_millis(590),
        "300 ms twice took {took:?}"
    );
    assert!(took < Duration::from_secs(5), "300 ms twice took {took:?}");
}

#[test]
#[ignore = "run by another test"]
fn part_copies_over_a_slow_link() {
    start();
    let mut host = 0_usize;
    ok!(cuMemHostAlloc(&raw mut host, 64 * MIB, 0));
    let device = alloc(64 * MIB);
    // Once to touch everything.
    ok!(cuMemcpyHtoD_v2(device, host, 64 * MIB));
    // The best of some, as a busy machine may hold any one of them up.
    let best = |copy: &dyn Fn()| {
        let timed = |_| {
            let began = Instant::now();
            copy();
            began.elapsed()
        };
        (0..4).map(timed).min().expect("some")
    };
    let into = best(&|| ok!(cuMemcpyHtoD_v2(device, host, 64 * MIB)));
    let out = best(&|| ok!(cuMemcpyDtoH_v2(host, device, 64 * MIB)));
    // 64 MiB at 0.5 and 0.25 GB/s: 134 and 268 ms.
    assert!((0.130..1.0).contains(&into.as_secs_f64()), "in {into:?}");
    assert!((0.262..1.5).contains(&out.as_secs_f64()), "out {out:?}");
}

#[test]
fn copies_take_the_time_of_the_link() {
    Machine::new(&[("SPILLWAY_SIM_LINK", "0.5,0.25")]).run("part_copies_over_a_slow_link");
}

#[test]
#[ignore = "run by another test"]
fn part_races_on_the_pool() {
    start();
    let mut context = 0_usize;
    ok!(cuCtxGetCurrent(&raw mut context));
    let race = |thread: u32| {
        ok!(cuCtxSetCurrent(context));
        let mut stream = 0_usize;
        ok!(cuStreamCreate(&raw mut stream, 1));
        let mut kept = std::collections::VecDeque::new();
        for round in 0..6000_u32 {
            let value = thread << 24 | round;
            let bytes = if round & 64 == 0 { 4096 } else { 2 * MIB };
            if kept.len() == 4 {
                let (address, value) = kept.pop_front().expect("kept");
                let mut seen = 0_u32;
                ok!(cuMemcpyDtoHAsync_v2(&raw mut seen, address, 4, stream));
                assert_eq!(seen, value, "thread {thread}, round {round}");
                ok!(cuMemFreeAsync(address, stream));
            }
            // At the very moment at which the free takes effect, or just before.
            let mut address = 0_usize;
            ok!(cuMemAllocAsync(&raw mut address, bytes, stream));
            ok!(cuMemsetD32Async(address, value, 16, stream));
            kept.push_back((address, value));
        }
        for (address, _) in kept {
            ok!(cuMemFreeAsync(address, stream));
        }
        ok!(cuStreamSynchronize(stream));
    };
    std::thread::scope(|scope| {
        for thread in 1..5 {
            scope.spawn(move || race(thread));
        }
    });
    wait_until("all memory", || free_bytes() >= 200 * MIB);
}

#[test]
fn threads_never_share_what_the_pool_hands_out() {
    Machine::new(&[("SPILLWAY_SIM_MEMORY", "256MiB")]).run("part_races_on_the_pool");
}

#[test]
#[ignore = "run by another test"]
fn part_meets_faults() {
    start();
    let mut address = 0_usize;
    assert_eq!(cu!(cuMemAlloc_v2(&raw mut address, MIB)), 0);
    assert_eq!(cu!(cuMemAlloc_v2(&raw mut address, MIB)), 2);
    assert_eq!(cu!(cuMemAlloc_v2(&raw mut address, MIB)), 0);
    let began = Instant::now();
    ok!(cuMemFree_v2(address));
    assert!(began.elapsed() >= Duration::from_millis(50));
    assert_eq!(cu!(cuCtxSynchronize()), 719);
}

#[test]
fn faults_strike_by_name_and_count() {
    let rules = "cuMemAlloc:2:oom,cuMemFree_v2:1:delay=50ms,cuCtxSynchronize:*:error=719";
    Machine::new(&[("SPILLWAY_SIM_FAULTS", rules)]).run("part_meets_faults");
}

#[test]
#[ignore = "run by another test"]
fn part_fails_to_start() {
    assert_ne!(cu!(cuInit(0)), 0);
}

#[test]
fn what_cannot_be_read_is_named() {
    for (name, value) in [
        ("SPILLWAY_SIM_MEMORY", "lots"),
        ("SPILLWAY_SIM_FAULTS", "x"),
        ("SPILLWAY_SIM_DRIVER", "9.9"),
    ] {
        let machine = Machine::new(&[(name, value)]);
        let output = machine
            .command("part_fails_to_start")
            .output()
            .expect("spawn");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() && said.contains(name), "{said}");
    }
}

#[test]
#[ignore = "run by another test"]
fn part_sees_one_gib() {
    start();
    let mut total = 0_usize;
    ok!(cuDeviceTotalMem_v2(&raw mut total, 0));
    assert_eq!(total, 1024 * MIB);
}

#[test]
fn the_first_process_decides() {
    let machine = Machine::new(&[("SPILLWAY_SIM_MEMORY", "1GiB")]);
    machine.run("part_sees_one_gib");
    let status = machine
        .command("part_sees_one_gib")
        .env("SPILLWAY_SIM_MEMORY", "2GiB")
        .status()
        .expect("spawn");
    assert!(status.success());
}

#[test]
fn processes_of_another_user_in_other_namespaces_take_part() {
    // SAFETY: geteuid has no preconditions.
    if unsafe { libc::geteuid() } != 0 {
        eprintln!("skipped: not root");
        return;
    }
    // Where the other user can reach the machine, the test program and the library.
    let machine = Machine::new(&[("SPILLWAY_SIM_MEMORY", "1GiB")]);
    std::fs::set_permissions(
        machine.dir(),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .expect("chmod");
    let program = machine.dir().join("program");
    std::fs::copy(std::env::current_exe().expect("current_exe"), &program).expect("copy");
    std::fs::copy(library(), machine.dir().join("libcuda.so")).expect("copy");
    let mut holder = machine.hold("part_holds_512_mib");
    let guest = |part: &str| {
        let output = Command::new("setpriv")
            .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
            .args(["unshare", "-Urpm", "--fork", "--mount-proc"])
            .arg(&program)
            .args(["--exact", part, "--ignored", "--nocapture"])
            .env("SPILLWAY_SIM_DIR", machine.dir().join("sim"))
            .output()
            .expect("setpriv");
        let said = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(output.status.success(), "{part}: {said}");
        assert!(said.contains("1 passed"), "{part} did not run: {said}");
    };
    guest("part_sees_half_used");
    holder.kill().expect("kill");
    holder.wait().expect("wait");
    guest("part_sees_512_mib_come_back");
}
