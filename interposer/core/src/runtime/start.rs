//! The beginning: configuration, devices, registration, threads. Runs inside the first `cuInit`.

use std::mem::MaybeUninit;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Condvar, Mutex, Once};

use spillway_protocol::message::{DeviceInfo, Register};
use spillway_protocol::page::{self, Command, DESIRED_MAGIC, Desired, Observed, State, state};
use spillway_protocol::{MAX_DEVICES, PROTOCOL_VERSION, Settings, names};

use super::{Contexts, Device, Runtime, exiting, forked_child, get, passive, publish, set_passive};
use crate::deferred::Deferred;
use crate::driver::{Status, call, strict};
use crate::handles::Handles;
use crate::heap::Heap;
use crate::overhead::Overhead;
use crate::pager::{self, Pager};
use crate::say;
use crate::session::{Session, StartError};
use crate::shares::Shares;
use crate::standing::Standing;

/// Why this process may not use CUDA. `cuInit` answers with the status; the line is on stderr.
#[derive(Clone, Copy, Debug)]
pub struct StartFailure(pub Status);

/// Serialises starts. A plain flag of ours, since a forked child must be able to reset it.
static STARTING: AtomicBool = AtomicBool::new(false);

/// After a fork no thread of the parent holds it.
pub(super) fn reset_in_child() {
    STARTING.store(false, SeqCst);
}

/// Starts once; later calls are answered from the outcome.
///
/// # Errors
/// A setting cannot be read, or the coordinator refuses this process.
pub fn start() -> Result<(), StartFailure> {
    if get().is_some() || passive() {
        return Ok(());
    }
    while STARTING.swap(true, SeqCst) {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    let outcome = if get().is_some() || passive() {
        Ok(())
    } else {
        start_alone()
    };
    STARTING.store(false, SeqCst);
    outcome
}

fn start_alone() -> Result<(), StartFailure> {
    let variable = |name: &str| std::env::var(name).ok();
    say::set_level(variable(names::ENV_LOG).as_deref());
    let config = Settings::read(&variable).map_err(|problems| {
        for problem in problems {
            say::error!("{problem}; CUDA is refused to this process");
        }
        StartFailure(Status::INVALID_VALUE)
    })?;
    if config.disabled {
        say::warning!("disabled by {}=1: no limit, no swap", names::ENV_DISABLE);
        set_passive();
        return Ok(());
    }
    strict::check_library(config.strict);
    let devices = devices().map_err(StartFailure)?;
    if devices.is_empty() {
        set_passive();
        return Ok(());
    }
    let session = register(&config, &devices)?;
    let runtime = publish(Box::new(assemble(&config, devices, session)));
    static AT_ENDS: Once = Once::new();
    AT_ENDS.call_once(|| {
        // SAFETY: both are plain functions that touch only this library's state. The library is
        // never unloaded before exit: a preloaded object has no handle to close.
        unsafe {
            libc::pthread_atfork(None, None, Some(forked_child));
            libc::atexit(exiting);
        }
    });
    if runtime.session.is_some() {
        pager::spawn(runtime);
    }
    crate::gate::set_on_wait(pager::caller_waits);
    Ok(())
}

/// The driver's devices, at most as many as a page holds.
fn devices() -> Result<Vec<Device>, Status> {
    let mut count = 0;
    // SAFETY: the driver fills one integer.
    unsafe { call::cuDeviceGetCount(&raw mut count) }.ok()?;
    let mut devices = Vec::new();
    for index in 0..count.clamp(0, i32::try_from(MAX_DEVICES).unwrap_or(0)) {
        let (mut ordinal, mut total) = (0, 0usize);
        let mut uuid = MaybeUninit::<[u8; 16]>::zeroed();
        // SAFETY: each call fills the one object that it is given; a uuid is 16 bytes.
        unsafe {
            call::cuDeviceGet(&raw mut ordinal, index).ok()?;
            call::cuDeviceTotalMem_v2(&raw mut total, ordinal).ok()?;
            let mut got = call::cuDeviceGetUuid_v2(uuid.as_mut_ptr().cast(), ordinal);
            if !got.is_success() {
                got = call::cuDeviceGetUuid(uuid.as_mut_ptr().cast(), ordinal);
            }
            got.ok()?;
        }
        // SAFETY: zeroed, then filled by the driver.
        let uuid = unsafe { uuid.assume_init() };
        devices.push(Device {
            ordinal,
            uuid,
            total: total as u64,
        });
    }
    Ok(devices)
}

fn register(config: &Settings, devices: &[Device]) -> Result<Option<Session>, StartFailure> {
    if config.no_coordinator {
        return Ok(None);
    }
    let register = Register {
        version: PROTOCOL_VERSION,
        workload: config.workload.clone(),
        request: config.request,
        limit: config.registered_limit(),
        priority: config.priority,
        swap: config.swap,
        resumes: 0,
        segments: 0,
        grants: vec![0; devices.len()],
        host_grant: 0,
        epoch: 0,
        devices: devices
            .iter()
            .map(|d| DeviceInfo {
                uuid: d.uuid,
                total_bytes: d.total,
            })
            .collect(),
    };
    match Session::start(register, pager::news) {
        Ok(session) => {
            say::info!("registered as workload {}", session.workload());
            Ok(Some(session))
        }
        Err(StartError::Refused(text)) => {
            say::error!("the coordinator refuses this process: {text}");
            Err(StartFailure(Status::NOT_PERMITTED))
        }
        Err(StartError::Absent(path, why)) => {
            let limits =
                if config.limit.or(config.request).is_some() || !config.device_limits.is_empty() {
                    "the limit is enforced for this process alone, and nothing is swapped"
                } else {
                    "no limit is set, and nothing is swapped"
                };
            say::warning!(
                "no coordinator at {} ({why}): {limits}. Start spillwayd, or set {} to its run directory",
                path.display(),
                names::ENV_RUN_DIR
            );
            Ok(None)
        }
    }
}

/// The page that holds without a coordinator: the grant is the limit.
fn local_page(config: &Settings, devices: &[Device]) -> (&'static Desired, bool) {
    let local: &'static Desired = Box::leak(Box::default());
    local.magic.store(DESIRED_MAGIC, SeqCst);
    local.command.store(
        Command {
            epoch: 1,
            code: page::command::RUN,
        }
        .pack(),
        SeqCst,
    );
    let mut limited = false;
    for (index, device) in devices.iter().enumerate() {
        let limit = config.limit_on(index, device.total);
        limited |= limit.is_some();
        local.devices[index]
            .limit
            .store(limit.unwrap_or(device.total), SeqCst);
        local.devices[index]
            .grant
            .store(limit.unwrap_or(u64::MAX / 2), SeqCst);
    }
    (local, limited)
}

/// The driver can reserve addresses, create and map memory on every device.
fn has_vmm(devices: &[Device]) -> bool {
    /// `CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED`
    const VMM_SUPPORTED: u32 = 102;
    devices.iter().all(|device| {
        let mut value = 0;
        // SAFETY: the driver fills one integer.
        let got =
            unsafe { call::cuDeviceGetAttribute(&raw mut value, VMM_SUPPORTED, device.ordinal) };
        got.is_success() && value != 0
    })
}

fn assemble(config: &Settings, devices: Vec<Device>, session: Option<Session>) -> Runtime {
    let (local, limited) = local_page(config, &devices);
    let observed: &'static Observed = match &session {
        Some(session) => session.observed(),
        None => Box::leak(Box::default()),
    };
    let vmm = has_vmm(&devices);
    if session.is_some() {
        let mut why = 0;
        if !config.swap {
            why |= page::unswappable::NEVER;
        }
        if !vmm {
            why |= page::unswappable::NO_VMM;
        }
        observed.unswappable.store(why, SeqCst);
        let first = Command::unpack(match &session {
            Some(session) => session.desired().command.load(SeqCst),
            None => 0,
        });
        observed.state.store(
            State {
                epoch: first.epoch,
                code: state::RESIDENT,
            }
            .pack(),
            SeqCst,
        );
    }
    let small = devices.iter().map(|_| Mutex::default()).collect();
    let graph_meters = devices.iter().map(|_| Mutex::default()).collect();
    let current_pools = devices.iter().map(|_| AtomicU64::new(0)).collect();
    let contexts = Contexts::default();
    Runtime {
        limited: session.is_some() || limited,
        paging: session.is_some() && config.swap && vmm,
        devices,
        observed,
        local,
        session,
        heap: Mutex::new(Heap::default()),
        heap_changed: Condvar::new(),
        teardowns: Mutex::new(0),
        glance: contexts.glance(),
        contexts: Mutex::new(contexts),
        contexts_changed: Condvar::new(),
        deferred: Mutex::new(Deferred::default()),
        has_deferred: AtomicBool::new(false),
        has_kept: AtomicBool::new(false),
        kept: Mutex::default(),
        handles: Mutex::new(Handles::default()),
        small,
        peers: Mutex::default(),
        pager: Pager::default(),
        pools: Mutex::default(),
        current_pools,
        has_own_pools: AtomicBool::new(false),
        has_stores: AtomicBool::new(false),
        pool_frees: AtomicBool::new(false),
        graphs: Mutex::default(),
        graph_meters,
        managed: Mutex::default(),
        shares: Shares::default(),
        overhead: Overhead::default(),
        any_old: AtomicBool::new(false),
        standing: Standing::default(),
        ending: AtomicBool::new(false),
    }
}

/// `CLOCK_MONOTONIC` in nanoseconds.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let mut time = MaybeUninit::<libc::timespec>::zeroed();
    // SAFETY: the kernel fills one timespec; this clock always exists.
    let time = unsafe {
        libc::clock_gettime(libc::CLOCK_MONOTONIC, time.as_mut_ptr());
        time.assume_init()
    };
    u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000
        + u64::try_from(time.tv_nsec).unwrap_or(0)
}
