//! Several devices in an order of the program's own: each has its limit, and NVML says the same of it, found
//! by its uuid.

use std::ffi::{CString, c_void};

use crate::driver::{
    Handle, cuCtxSetCurrent, cuDeviceGetCount, cuDeviceGetUuid, cuDevicePrimaryCtxRelease_v2,
    cuDevicePrimaryCtxRetain, cuDeviceTotalMem_v2, cuMemAlloc_v2, cuMemFree_v2,
};
use crate::stage::{Case, Done, GRANULE, Stage, Stop, info, need};

/// NVML, as a program finds it.
struct Nvml(*mut c_void);

impl Nvml {
    fn open() -> Option<Self> {
        // SAFETY: a C string; the library's constructors are the driver's own.
        let handle = unsafe { libc::dlopen(c"libnvidia-ml.so.1".as_ptr(), libc::RTLD_NOW) };
        let this = (!handle.is_null()).then_some(Self(handle))?;
        let init: unsafe extern "C" fn() -> i32 = this.at("nvmlInit_v2")?;
        // SAFETY: NVML's initialisation has no arguments.
        (unsafe { init() } == 0).then_some(this)
    }

    fn at<F: Copy>(&self, name: &str) -> Option<F> {
        let name = CString::new(name).ok()?;
        // SAFETY: an open library and a C string.
        let at = unsafe { libc::dlsym(self.0, name.as_ptr()) };
        // SAFETY: the caller names the type of the function of this name; a pointer is as large.
        (!at.is_null()).then(|| unsafe { std::mem::transmute_copy::<*mut c_void, F>(&at) })
    }

    /// Total and free of the device with a uuid.
    fn memory(&self, uuid: [u8; 16]) -> Option<(u64, u64)> {
        type ByUuid = unsafe extern "C" fn(*const i8, *mut *mut c_void) -> i32;
        type Memory = unsafe extern "C" fn(*mut c_void, *mut [u64; 3]) -> i32;
        let by_uuid: ByUuid = self.at("nvmlDeviceGetHandleByUUID")?;
        let memory: Memory = self.at("nvmlDeviceGetMemoryInfo")?;
        let hex: String = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
        let text = format!(
            "GPU-{}-{}-{}-{}-{}",
            &hex[..8],
            &hex[8..12],
            &hex[12..16],
            &hex[16..20],
            &hex[20..]
        );
        let text = CString::new(text).ok()?;
        let (mut device, mut sizes) = (std::ptr::null_mut(), [0; 3]);
        // SAFETY: a C string and results of the types that these functions fill.
        let found = unsafe {
            by_uuid(text.as_ptr(), &raw mut device) == 0 && memory(device, &raw mut sizes) == 0
        };
        found.then_some((sizes[0], sizes[1]))
    }
}

fn one(case: &mut Case<'_>, nvml: &Nvml, ordinal: i32, context: Handle) -> Done {
    need(cuCtxSetCurrent(context), "cuCtxSetCurrent")?;
    let (mut uuid, mut total) = ([0; 16], 0);
    need(cuDeviceGetUuid(&mut uuid, ordinal), "cuDeviceGetUuid")?;
    need(cuDeviceTotalMem_v2(&mut total, ordinal), "cuDeviceTotalMem")?;
    let (free, told) = info();
    if told != total as u64 {
        case.wrong(format!(
            "device {ordinal}: cuMemGetInfo {told}, cuDeviceTotalMem {total}"
        ));
    }
    let agree = |case: &mut Case<'_>, when: &str| {
        let (free, told) = info();
        match nvml.memory(uuid) {
            Some(seen) if seen == (told, free) => {}
            seen => case.wrong(format!(
                "device {ordinal} {when}: NVML {seen:?}, the driver {:?}",
                (told, free)
            )),
        }
    };
    agree(case, "at first");
    let mut at = 0;
    let all = free / GRANULE * GRANULE;
    let code = cuMemAlloc_v2(&mut at, all as usize);
    if case.fits(code, all, "cuMemAlloc") {
        case.took(all);
        let mut more = 0;
        let code = cuMemAlloc_v2(&mut more, GRANULE as usize);
        case.too_much(code, GRANULE, "cuMemAlloc");
        agree(case, "full");
        case.top();
        case.gave(all);
        cuMemFree_v2(at);
    }
    Ok(())
}

/// See the module; the order is in the environment.
pub fn run(stage: &Stage) {
    let (mut count, mut contexts) = (0, Vec::new());
    let counted = cuDeviceGetCount(&mut count);
    for ordinal in 0..count {
        let mut context: Handle = 0;
        if cuDevicePrimaryCtxRetain(&mut context, ordinal).is_ok() {
            contexts.push(context);
        }
    }
    stage.case("every device in its order", |case| {
        let nvml = Nvml::open().ok_or_else(|| Stop::Skip("no NVML".to_owned()))?;
        need(counted, "cuDeviceGetCount")?;
        if contexts.len() != 3 {
            return Err(Stop::Broken(format!("{count} devices instead of 3")));
        }
        for (ordinal, &context) in (0..).zip(&contexts) {
            one(case, &nvml, ordinal, context)?;
        }
        need(cuCtxSetCurrent(stage.context), "cuCtxSetCurrent")
    });
    for ordinal in 0..count {
        cuDevicePrimaryCtxRelease_v2(ordinal);
    }
}
