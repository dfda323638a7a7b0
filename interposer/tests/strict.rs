//! The strict library stands in the driver's place: everybody finds it there, and what it does not know is
//! refused. Against a fake driver, as in `entry.rs`.

mod support;

use std::path::Path;
use std::process::Command;
use support::{Preload, command, output, outputs, programs, strict_library};

fn strict(folder: &Path, preload: Preload) -> Command {
    let mut command = command(&folder.join("strict"), folder, preload);
    command.arg(folder.join("libcuda.so.1"));
    command
}

#[test]
fn what_is_unknown_is_refused_and_the_rest_is_found() {
    let Some(folder) = programs("strict look-ups") else {
        return;
    };
    let (printed, said) = outputs(&mut strict(folder, Preload::Strict), 0);
    let expected = "\
before cuInit -> libspillway_strict.so:cuInit
before cuDriverGetVersion -> libspillway_strict.so:cuDriverGetVersion
before cuMemcpyDtoD_v2 -> libspillway_strict.so:cuMemcpyDtoD_v2
before cuBrandNewCall -> null with dlerror
before cuNoSuchThing -> null with dlerror
before cuda_plain_name -> null with dlerror
call 0 version 13000
after cuInit -> libspillway_strict.so:cuInit
after cuDriverGetVersion -> libspillway_strict.so:cuDriverGetVersion
after cuMemcpyDtoD_v2 -> null with dlerror
after cuBrandNewCall -> null with dlerror
after cuNoSuchThing -> null with dlerror
after cuda_plain_name -> null with dlerror
default cuInit -> libspillway_strict.so:cuInit
default cuBrandNewCall -> null with dlerror
next cuInit -> libspillway_strict.so:cuInit
next cuBrandNewCall -> null with dlerror
cuMemAlloc -> 0 0 libspillway_strict.so:cuMemAlloc_v2, v1 0 libspillway_strict.so:cuMemAlloc_v2
cuDriverGetVersion -> 0 0 libspillway_strict.so:cuDriverGetVersion, v1 0 libspillway_strict.so:cuDriverGetVersion
cuBrandNewCall -> 500 1 null, v1 500 null
cuFutureCall -> 500 1 null, v1 500 null
cuMemFree -> 500 1 null, v1 500 null
cuNoSuchThing -> 500 1 null, v1 500 null
by path cuInit -> libspillway_strict.so:cuInit
by path cuDriverGetVersion -> libspillway_strict.so:cuDriverGetVersion
by path cuMemcpyDtoD_v2 -> null with dlerror
by path cuBrandNewCall -> null with dlerror
by path cuNoSuchThing -> null with dlerror
by path cuda_plain_name -> null with dlerror
driver itself cuMemAlloc_v2 -> libcuda.so.1:cuMemAlloc_v2
driver itself cuBrandNewCall -> libcuda.so.1:cuBrandNewCall
";
    assert_eq!(printed, expected);
    // A line per entry point, however often it is asked for; none for what the driver lacks.
    for name in ["cuBrandNewCall", "cuFutureCall", "cuMemFree"] {
        let lines = said.lines().filter(|line| line.contains(name));
        assert_eq!(lines.count(), 1, "{name}: {said}");
    }
    assert_eq!(said.lines().count(), 3, "{said}");
}

/// The setting alone, with the library that is not in the driver's place.
#[test]
fn the_plain_library_can_refuse_what_is_unknown_too() {
    let Some(folder) = programs("strict by setting") else {
        return;
    };
    let run = |value: &str| {
        let mut command = strict(folder, Preload::Plain);
        outputs(command.env("SPILLWAY_STRICT", value), 0)
    };
    let (printed, said) = run("1");
    let (lax, nothing) = run("0");
    assert_eq!(nothing, "");
    for (line, refused) in [
        (
            "before cuBrandNewCall -> libcuda.so.1:cuBrandNewCall",
            "before cuBrandNewCall -> null with dlerror",
        ),
        (
            "by path cuBrandNewCall -> libcuda.so.1:cuBrandNewCall",
            "by path cuBrandNewCall -> null with dlerror",
        ),
        (
            "cuBrandNewCall -> 0 0 libcuda.so.1:cuBrandNewCall, v1 0 libcuda.so.1:cuBrandNewCall",
            "cuBrandNewCall -> 500 1 null, v1 500 null",
        ),
        (
            "cuMemFree -> 0 0 libcuda.so.1:?, v1 0 libcuda.so.1:?",
            "cuMemFree -> 500 1 null, v1 500 null",
        ),
        (
            "after cuInit -> libspillway.so:cuInit",
            "after cuInit -> libspillway.so:cuInit",
        ),
        (
            "before cuDriverGetVersion -> libcuda.so.1:cuDriverGetVersion",
            "before cuDriverGetVersion -> libcuda.so.1:cuDriverGetVersion",
        ),
    ] {
        assert!(lax.lines().any(|l| l == line), "{line} in\n{lax}");
        assert!(
            printed.lines().any(|l| l == refused),
            "{refused} in\n{printed}"
        );
    }
    assert_eq!(said.matches("cuBrandNewCall").count(), 1, "{said}");
    // Off, where everything is.
    let mut disabled = strict(folder, Preload::Plain);
    disabled
        .env("SPILLWAY_STRICT", "1")
        .env("SPILLWAY_DISABLE", "1");
    assert_eq!(outputs(&mut disabled, 0), (lax, String::new()));
    // A value that means nothing is not off.
    assert_eq!(run("yes").0, printed);
}

/// Both ways for a plugin to look past a preloaded library.
#[test]
fn a_plugin_that_looks_into_its_dependencies_first_finds_us_there() {
    let Some(folder) = programs("RTLD_DEEPBIND") else {
        return;
    };
    let run = |preload, how: &str| {
        let mut command = command(&folder.join("deep"), folder, preload);
        output(command.arg(folder.join("libdeep_plugin.so")).arg(how), 0)
    };
    let found = |text: &str, what: &str| {
        let start = format!("plugin: {what} is ");
        let line = text.lines().find_map(|line| line.strip_prefix(&start));
        let line = line.unwrap_or_else(|| panic!("{what} in\n{text}"));
        line.split(':').next().unwrap_or_default().to_owned()
    };
    let hooked = [
        "early default cuMemAlloc_v2",
        "early next cuMemAlloc_v2",
        "linked cuMemAlloc_v2",
        "next cuMemAlloc_v2",
        "default cuMemAlloc_v2",
        "opened cuMemAlloc_v2",
    ];
    // Without us, and with the plain library, such a plugin has the driver itself.
    for preload in [Preload::Nothing, Preload::Plain] {
        let printed = run(preload, "deep");
        assert_eq!(found(&printed, "linked cuMemAlloc_v2"), "libcuda.so.1");
        assert_eq!(found(&printed, "opened cuMemAlloc_v2"), "libcuda.so.1");
        assert_eq!(found(&printed, "opened cuBrandNewCall"), "libcuda.so.1");
    }
    for (preload, how, library) in [
        (Preload::Nothing, "usual", "libcuda.so.1"),
        (Preload::Plain, "usual", "libspillway.so"),
        (Preload::Strict, "usual", "libspillway_strict.so"),
        (Preload::Strict, "deep", "libspillway_strict.so"),
    ] {
        let printed = run(preload, how);
        for what in hooked {
            assert_eq!(found(&printed, what), library, "{what} in\n{printed}");
        }
        assert_eq!(found(&printed, "opened cuNoSuchThing"), "null");
        // What is not hooked ends in the driver, too.
        assert!(
            printed.contains("plugin: init 1\nplugin: version 0 13000\nplugin: alloc 0\n"),
            "{printed}"
        );
        if preload == Preload::Strict {
            assert_eq!(found(&printed, "linked cuDriverGetVersion"), library);
            assert_eq!(found(&printed, "opened cuBrandNewCall"), "null");
            assert_eq!(found(&printed, "early default cuBrandNewCall"), "null");
        }
    }
}

/// The library itself may lie there under the driver's name, in front of the driver.
#[test]
fn our_own_file_is_never_taken_for_the_driver() {
    let Some(folder) = programs("our own file") else {
        return;
    };
    let front = folder.join("front");
    std::fs::create_dir_all(&front).expect("a folder");
    let disguised = front.join("libcuda.so.1");
    std::fs::copy(strict_library(), &disguised).expect("a copy");
    let library_path = format!("{}:{}", front.display(), folder.display());
    let expected = "call 0 version 13000\n";
    for preload in [&disguised, &strict_library()] {
        let mut command = command(&folder.join("strict"), folder, Preload::Nothing);
        command
            .env("LD_LIBRARY_PATH", &library_path)
            .env("LD_PRELOAD", preload);
        let printed = output(&mut command, 0);
        assert!(printed.contains(expected), "{preload:?}: {printed}");
        // A name that only a loaded driver can deny.
        assert!(
            printed.contains("after cuMemcpyDtoD_v2 -> null"),
            "{printed}"
        );
    }
    // Named as the driver it is refused by name, and nothing else is guessed.
    for (value, says) in [
        (disguised.display().to_string(), "Spillway's own library"),
        ("/no/such/libcuda.so.1".to_owned(), "No such file"),
        ("libcuda.so.1".to_owned(), "no absolute path"),
    ] {
        let mut command = command(&folder.join("strict"), folder, Preload::Strict);
        command.env("SPILLWAY_DRIVER_LIBRARY", &value);
        let (printed, said) = outputs(&mut command, 0);
        assert!(printed.contains("call 100 version 0\n"), "{printed}");
        assert!(said.contains(&value) && said.contains(says), "{said}");
    }
    // Where there is no driver at all: no device, and one line.
    let mut command = command(&folder.join("strict"), &front, Preload::Strict);
    let (printed, said) = outputs(&mut command, 0);
    assert!(printed.contains("call 100 version 0\n"), "{printed}");
    assert_eq!(said.matches("no driver").count(), 1, "{said}");
}

/// The driver that is named is the one that is used.
#[test]
fn the_named_driver_is_used() {
    let Some(folder) = programs("a named driver") else {
        return;
    };
    let mut command = command(
        &folder.join("strict"),
        Path::new("/nowhere"),
        Preload::Strict,
    );
    command.env("SPILLWAY_DRIVER_LIBRARY", folder.join("libcuda.so.1"));
    let printed = output(&mut command, 0);
    assert!(printed.contains("call 0 version 13000\n"), "{printed}");
}
