//! In a container that root did not make: another user, user, mount and pid namespaces of its own,
//! and nothing mounted but the driver, the library and the session directory.

#[path = "support/programs.rs"]
mod programs;

use std::time::Duration;

use programs::{compile, have};
use spillway_tests::{Place, until};

/// Builds the container's root file system and goes there. `$1`: an empty folder; `$2`: the place.
const ENTER: &str = r#"
set -eu
root=$1 place=$2
mount -t tmpfs -o mode=755 tmpfs "$root"
for dir in bin sbin lib lib64 usr; do
    if [ -L "/$dir" ]; then cp -P "/$dir" "$root/$dir"
    elif [ -d "/$dir" ]; then mkdir "$root/$dir"; mount --rbind "/$dir" "$root/$dir"
    fi
done
mkdir -p "$root/proc" "$root/tmp" "$root/dev" "$root/opt/driver" "$root/opt/sim" "$root/run/spillway/session"
touch "$root/dev/null" "$root/opt/libspillway.so" "$root/opt/host"
mount --bind /dev/null "$root/dev/null"
mount -t proc proc "$root/proc" 2>/dev/null || true
cp "$place/lib/libcuda.so.1" "$place/lib/libnvidia-ml.so.1" "$root/opt/driver/"
mount --bind "$place/sim" "$root/opt/sim"
mount --bind "$place/lib/libspillway.so" "$root/opt/libspillway.so"
mount --bind "$place/host" "$root/opt/host"
mount --bind "$place/run/session" "$root/run/spillway/session"
cd "$root"
unset SPILLWAY_RUN_DIR
export LD_LIBRARY_PATH=/opt/driver SPILLWAY_SIM_DIR=/opt/sim
exec chroot . /usr/bin/env LD_PRELOAD=/opt/libspillway.so /opt/host holds 96
"#;

#[test]
fn a_client_in_a_container_is_swapped_and_survives_a_restart_of_the_daemon() {
    const NAME: &str = "container";
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: {NAME}: not root");
        return;
    }
    for tool in ["cc", "setpriv", "unshare", "chroot"] {
        if !have(tool, NAME) {
            return;
        }
    }
    let place = Place::new(NAME).world().build();
    compile(&place, "host.c", "host", &[]);
    let root = place.dir().join("root");
    std::fs::create_dir(&root).expect("a folder");
    let inside = "setpriv --reuid 65534 --regid 65534 --clear-groups unshare -Urpm --fork";
    let mut words = inside.split(' ');
    // What a sandbox around this test may forbid.
    let mut probe = place.command(words.next().expect("a word"));
    probe
        .args(words.clone())
        .args(["/bin/sh", "-c", "mount -t tmpfs tmpfs \"$1\"", "sh"]);
    let shot = place.run({
        probe.arg(&root);
        probe
    });
    if shot.code != Some(0) {
        eprintln!(
            "skipped: {NAME}: no namespaces here: {}",
            shot.stderr.trim()
        );
        return;
    }
    let daemon = place.daemon(&[]);
    let mut client = place
        .program("setpriv")
        .bare()
        .args(&inside[inside.find(' ').expect("a space")..])
        .args("/bin/sh -c")
        .arg(ENTER)
        .arg("sh")
        .arg(&root)
        .arg(place.dir())
        .limit("512MiB")
        .start();
    assert_eq!(client.line(), "ready?", "{}", client.stderr());
    assert_eq!(client.stderr(), "");
    let workloads = daemon.get("/v1/workloads")["workloads"].clone();
    let all = workloads.as_array().expect("workloads");
    assert_eq!(all.len(), 1, "{workloads}");
    // No name was given: it is the container's.
    let name = all[0]["name"].as_str().expect("a name").to_owned();
    assert!(name.starts_with("container-"), "{name}");
    assert_eq!(all[0]["processes"][0]["uid"], 65534);
    assert!(daemon.evict_when_idle(&name).bytes >= 96 << 20);
    assert_eq!(client.ask("check"), "bytes right");
    assert_eq!(daemon.state(&name), "resident");

    // Resident over a restart.
    daemon.terminate();
    assert_eq!(client.ask("check"), "bytes right");
    let daemon = place.daemon(&[]);
    daemon.await_state(&name, "resident");
    assert!(daemon.evict_when_idle(&name).bytes >= 96 << 20);

    // On the host over a restart.
    daemon.kill();
    let daemon = place.daemon(&[]);
    daemon.await_state(&name, "evicted");
    assert_eq!(
        client.ask_within("check", Duration::from_secs(40)),
        "bytes right"
    );
    assert_eq!(client.ask("grow 64"), "grown");
    assert_eq!(client.ask("check"), "bytes right");
    client.close_stdin();
    assert_eq!(client.wait(Duration::from_secs(20)), Some(0));
    until("its share is free", || {
        (daemon.status()["devices"][0]["granted_bytes"] == 0).then_some(())
    });
}
