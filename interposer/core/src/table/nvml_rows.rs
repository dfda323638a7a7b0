//! The few NVML names that this library answers or calls; the same form as [`super::rows`]. NVML has no
//! `cuGetProcAddress`, so base name and version say nothing here.

/// Hands all rows to the macro `$use_rows`, which must be in scope where this one is called.
#[macro_export]
macro_rules! nvml_rows {
    ($use_rows:ident) => {
        $use_rows! {
            NVML
            custom reports nvmlDeviceGetComputeRunningProcesses = nvmlDeviceGetComputeRunningProcesses 0 [] (device: *mut c_void, infoCount: *mut u32, infos: *mut c_void);
            custom reports nvmlDeviceGetComputeRunningProcesses_v2 = nvmlDeviceGetComputeRunningProcesses 0 [] (device: *mut c_void, infoCount: *mut u32, infos: *mut c_void);
            custom reports nvmlDeviceGetComputeRunningProcesses_v3 = nvmlDeviceGetComputeRunningProcesses 0 [] (device: *mut c_void, infoCount: *mut u32, infos: *mut c_void);
            slot none nvmlDeviceGetCount_v2 = nvmlDeviceGetCount 0 [] (deviceCount: *mut u32);
            custom reports nvmlDeviceGetGraphicsRunningProcesses = nvmlDeviceGetGraphicsRunningProcesses 0 [] (device: *mut c_void, infoCount: *mut u32, infos: *mut c_void);
            custom reports nvmlDeviceGetGraphicsRunningProcesses_v2 = nvmlDeviceGetGraphicsRunningProcesses 0 [] (device: *mut c_void, infoCount: *mut u32, infos: *mut c_void);
            custom reports nvmlDeviceGetGraphicsRunningProcesses_v3 = nvmlDeviceGetGraphicsRunningProcesses 0 [] (device: *mut c_void, infoCount: *mut u32, infos: *mut c_void);
            slot none nvmlDeviceGetHandleByIndex_v2 = nvmlDeviceGetHandleByIndex 0 [] (index: u32, device: *mut *mut c_void);
            slot none nvmlDeviceGetHandleByUUID = nvmlDeviceGetHandleByUUID 0 [] (uuid: *const c_char, device: *mut *mut c_void);
            custom reports nvmlDeviceGetMPSComputeRunningProcesses = nvmlDeviceGetMPSComputeRunningProcesses 0 [] (device: *mut c_void, infoCount: *mut u32, infos: *mut c_void);
            custom reports nvmlDeviceGetMPSComputeRunningProcesses_v2 = nvmlDeviceGetMPSComputeRunningProcesses 0 [] (device: *mut c_void, infoCount: *mut u32, infos: *mut c_void);
            custom reports nvmlDeviceGetMPSComputeRunningProcesses_v3 = nvmlDeviceGetMPSComputeRunningProcesses 0 [] (device: *mut c_void, infoCount: *mut u32, infos: *mut c_void);
            custom reports nvmlDeviceGetMemoryInfo = nvmlDeviceGetMemoryInfo 0 [] (device: *mut c_void, memory: *mut c_void);
            custom reports nvmlDeviceGetMemoryInfo_v2 = nvmlDeviceGetMemoryInfo 0 [] (device: *mut c_void, memory: *mut c_void);
            slot none nvmlDeviceGetUUID = nvmlDeviceGetUUID 0 [] (device: *mut c_void, uuid: *mut c_char, length: u32);
            slot none nvmlInit_v2 = nvmlInit 0 [] ();
            slot none nvmlShutdown = nvmlShutdown 0 [] ();
        }
    };
}
