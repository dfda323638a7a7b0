//! The way into the library, as programs take it: by `dlsym`, by `cuGetProcAddress`, by linking.
//! Against a fake driver, so that what arrives there can be told exactly.

mod support;

use support::{Preload, command, output, programs};

fn lines<'a>(text: &'a str, start: &str) -> Vec<&'a str> {
    text.lines()
        .filter(|line| line.starts_with(start))
        .collect()
}

#[test]
fn names_are_answered_as_the_real_look_up_would_or_by_our_exports() {
    let Some(folder) = programs("names") else {
        return;
    };
    let bare = output(
        &mut command(&folder.join("look_up"), folder, Preload::Nothing),
        0,
    );
    let ours = output(
        &mut command(&folder.join("look_up"), folder, Preload::Plain),
        0,
    );
    // Found or not: always the same.
    let verdict = |text: &str| -> Vec<String> {
        text.lines()
            .map(|line| {
                line.replace("libspillway.so:", "libcuda.so.1:")
                    .replace("libcuda.so.1:nvml", "libnvidia-ml.so.1:nvml")
            })
            .collect()
    };
    assert_eq!(verdict(&bare), verdict(&ours));
    // Hooked names come from us, others from the driver.
    for expected in [
        "default-unloaded cuInit -> null with dlerror",
        "next-unloaded cuInit -> null with dlerror",
        "self-unloaded cuMemAlloc_v2 -> null with dlerror",
        "handle cuInit -> libspillway.so:cuInit",
        "handle cuMemAlloc_v2 -> libspillway.so:cuMemAlloc_v2",
        "handle cuMemcpyHtoD_v2_ptds -> libspillway.so:cuMemcpyHtoD_v2_ptds",
        "handle cuGetProcAddress_v2 -> libspillway.so:cuGetProcAddress_v2",
        "handle cuDriverGetVersion -> libcuda.so.1:cuDriverGetVersion",
        "handle cuBrandNewCall -> libcuda.so.1:cuBrandNewCall",
        "handle cuMemcpyDtoD_v2 -> null with dlerror",
        "handle nvmlDeviceGetMemoryInfo -> libspillway.so:nvmlDeviceGetMemoryInfo",
        "handle nvmlDeviceGetCount_v2 -> libnvidia-ml.so.1:nvmlDeviceGetCount_v2",
        "driver itself cuMemAlloc_v2 in its handle -> libcuda.so.1:cuMemAlloc_v2",
        "default-global cuInit -> libspillway.so:cuInit",
        "next-global cuInit -> libspillway.so:cuInit",
        "self-global cuMemAlloc_v2 -> libspillway.so:cuMemAlloc_v2",
    ] {
        assert_eq!(lines(&ours, expected), [expected], "in\n{ours}");
    }
}

#[test]
fn the_callers_scope_is_the_callers() {
    let Some(folder) = programs("scope") else {
        return;
    };
    let run = |preload| {
        output(
            command(&folder.join("scope"), folder, preload).arg(folder.join("libscope_plugin.so")),
            0,
        )
    };
    let bare = run(Preload::Nothing);
    assert!(
        bare.contains("plugin: next scope_probe is libscope_library.so:scope_probe"),
        "{bare}"
    );
    assert!(
        bare.contains("plugin: default scope_local_only is libscope_library.so"),
        "{bare}"
    );
    assert_eq!(bare, run(Preload::Plain));
    assert_eq!(bare, run(Preload::Strict));
}

#[test]
fn arguments_arrive_whole() {
    let Some(folder) = programs("calls") else {
        return;
    };
    let expected = "launch 4011\ncopy 4001\ncopy ptds 4002\ncopy async 4004\nby value 64 4064\nby value 8 4008\ntwelve 4012\na fraction 4003\nseven 4007\n".repeat(3);
    for program in ["calls", "calls_direct"] {
        for preload in [Preload::Nothing, Preload::Plain, Preload::Strict] {
            let printed = output(&mut command(&folder.join(program), folder, preload), 0);
            assert_eq!(printed, expected, "{program}, {preload:?}");
        }
    }
}

#[test]
fn a_function_that_the_driver_lacks_answers_not_found() {
    let Some(folder) = programs("missing") else {
        return;
    };
    let printed = output(
        &mut command(&folder.join("missing"), &folder.join("old"), Preload::Plain),
        0,
    );
    assert_eq!(printed, "copy 4001\nmissing 500\n");
}

#[test]
fn answers_of_the_driver_are_mapped_by_address() {
    let Some(folder) = programs("proc address") else {
        return;
    };
    let printed = output(
        &mut command(&folder.join("proc_address"), folder, Preload::Plain),
        0,
    );
    let expected = "\
cuInit 13000 flags 0 -> 0 0 libspillway.so:cuInit
cuDriverGetVersion 13000 flags 0 -> 0 0 libcuda.so.1:cuDriverGetVersion
cuMemAlloc 13000 flags 0 -> 0 0 libspillway.so:cuMemAlloc_v2
cuMemcpyHtoD 13000 flags 0 -> 0 0 libspillway.so:cuMemcpyHtoD_v2
cuMemcpyHtoD 13000 flags 1 -> 0 0 libspillway.so:cuMemcpyHtoD_v2
cuMemcpyHtoD 13000 flags 2 -> 0 0 libspillway.so:cuMemcpyHtoD_v2_ptds
cuMemcpyHtoD 3020 flags 2 -> 0 0 libspillway.so:cuMemcpyHtoD_v2
cuLaunchKernel 13000 flags 0 -> 0 0 libspillway.so:cuLaunchKernel
cuGraphUpload 13000 flags 0 -> 0 0 libspillway.so:cuGraphUpload
";
    assert!(printed.starts_with(expected), "{printed}");
    for expected in [
        // Folded into one address with hooked ones, but not hooked itself: the driver's answer stays.
        "cuUserObjectRetain 13000 flags 0 -> 0 0 libcuda.so.1:",
        "cuBrandNewCall 14000 flags 0 -> 0 0 libcuda.so.1:cuBrandNewCall",
        "cuNoSuchThing 13000 flags 0 -> 500 1 null",
        "cuGetProcAddress 11030 flags 0 -> 0 0 libspillway.so:cuGetProcAddress",
        "cuGetProcAddress 13000 flags 0 -> 0 0 libspillway.so:cuGetProcAddress_v2",
        "through itself 0",
        "copy 4002",
    ] {
        assert_eq!(
            lines(&printed, expected).len(),
            1,
            "{expected} in\n{printed}"
        );
    }
    assert!(!printed.contains("v1 differs"), "{printed}");
}

#[test]
fn host_processes_may_do_what_they_do() {
    let Some(folder) = programs("host") else {
        return;
    };
    for (what, code, expected) in [
        (
            "fork",
            0,
            "before any use 0\nbefore the first call 0\ncall 4001\nafter the first call 0\nwith threads calling 0\n",
        ),
        ("longjmp", 0, "call 4001\n"),
        ("pthread_exit", 0, "call 4001\n"),
        ("late", 0, "late call\ncall 4001\n"),
        ("_exit", 7, "call 4001\n"),
        (
            "dlclose",
            0,
            "call 4001\ncall 4001\ncall 4001\ncall after close 4001\ncall 4001\n",
        ),
    ] {
        for preload in [Preload::Nothing, Preload::Plain, Preload::Strict] {
            let printed = output(
                command(&folder.join("host"), folder, preload).arg(what),
                code,
            );
            assert_eq!(printed, expected, "{what}, {preload:?}");
        }
    }
}
