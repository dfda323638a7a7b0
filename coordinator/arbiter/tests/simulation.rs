//! A random world, checked after every event. The seed is printed; `SPILLWAY_SEED=n` repeats it,
//! `SPILLWAY_SEEDS=n` tries that many.
//!
//! Checked always (by the world): the ledger covers what is physically held, charges stay within the
//! room, grants within the limits. Checked here: who stays within its request gets what it waits for
//! in bounded time, and so does everybody who drains, but for borrowers whose space is used by active
//! workloads within theirs; nothing is moved while nobody waits.

mod world;

use spillway_arbiter::*;
use world::*;

/// A small generator with a known sequence: results depend on the seed alone.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn pick<T: Copy>(&mut self, all: &[T]) -> Option<T> {
        let n = u64::try_from(all.len()).expect("small");
        (n > 0).then(|| all[usize::try_from(self.below(n)).expect("small")])
    }
}

fn live(w: &World) -> Vec<ProcessId> {
    w.pages.0.keys().copied().collect()
}

/// Bytes in 2 MiB steps.
fn bytes(random: &mut Random, most: u64) -> u64 {
    (random.below(most / (2 * MIB)) + 1) * 2 * MIB
}

struct Waits {
    /// Since when each unanswered growth and each wish to be back could have been served.
    growths: std::collections::BTreeMap<(ProcessId, u64), Nanos>,
    restores: std::collections::BTreeMap<ProcessId, Nanos>,
}

/// Turns of everybody in front, with their swaps, and some more.
fn bound(w: &World) -> Nanos {
    let n = u64::try_from(w.pages.0.len()).expect("small");
    30 * SECOND + (n + 2) * 4 * (w.config.turn + SECOND)
}

/// Nobody could be served: active workloads within their requests, or those that never move, have
/// what it would need.
fn excepted(w: &World, id: ProcessId) -> bool {
    let workload = w.workload(id);
    let others = |device: DeviceId| -> u64 {
        w.arbiter
            .workload_ids()
            .filter(|other| *other != workload)
            .filter(|other| {
                (w.arbiter.is_active(w.now, *other) && !w.arbiter.is_borrower(*other))
                    || !w.arbiter.is_swappable(*other)
            })
            .map(|other| w.arbiter.charge(other, device))
            .sum()
    };
    let everybody_else = |device: DeviceId| -> u64 {
        w.arbiter
            .workload_ids()
            .filter(|other| *other != workload)
            .flat_map(|other| w.arbiter.processes_of(other))
            .filter_map(|p| w.pages.0[&p].shares.get(&device))
            .map(|share| share.pinned + share.overhead)
            .sum()
    };
    w.arbiter.is_borrower(workload)
        && w.pages.0[&id].shares.keys().any(|device| {
            let own = w.arbiter.usage(workload, *device) + 512 * MIB;
            own + others(*device).max(everybody_else(*device)) > w.rooms[*device]
        })
}

fn check_waits(w: &World, waits: &mut Waits) {
    let asked: Vec<_> = w
        .asked
        .keys()
        .filter(|key| !w.answers.contains_key(*key) && w.pages.0.contains_key(&key.0))
        .copied()
        .collect();
    waits.growths.retain(|key, _| asked.contains(key));
    let behaves = w.pages.0.values().all(|p| p.mode == Mode::Normal);
    for key in asked {
        let since = waits.growths.entry(key).or_insert(w.now);
        if !behaves {
            *since = w.now;
        }
        assert!(
            w.now - *since < bound(w),
            "a growth of {} waits for {} s: {:?}",
            w.pages.0[&key.0].name,
            (w.now - *since) / SECOND,
            w.waiting()
        );
    }
    let wanting: Vec<ProcessId> = w
        .pages
        .0
        .iter()
        .filter(|(_, p)| p.wants)
        .map(|(id, _)| *id)
        .collect();
    waits.restores.retain(|id, _| wanting.contains(id));
    for id in wanting {
        let since = waits.restores.entry(id).or_insert(w.now);
        if !behaves || excepted(w, id) {
            *since = w.now;
        }
        assert!(
            w.now - *since < bound(w),
            "{} waits for {} s to come back: {:?}",
            w.pages.0[&id].name,
            (w.now - *since) / SECOND,
            w.waiting()
        );
    }
}

fn run(seed: u64, steps: u32) {
    let mut random = Random(seed);
    let devices = 1 + random.below(2);
    let rooms: Vec<u64> = (0..devices).map(|_| (2 + random.below(6)) * GIB).collect();
    let config = Config {
        slack: if random.below(2) == 0 { 0 } else { 64 * MIB },
        oversubscription: if random.below(4) == 0 { 1.5 } else { 1.0 },
        ..Config::default()
    };
    let mut w = World::new(config, &rooms);
    let mut waits = Waits {
        growths: std::collections::BTreeMap::new(),
        restores: std::collections::BTreeMap::new(),
    };
    let misbehaviour = random.below(3) == 0;
    let mut names = 0;
    for _ in 0..steps {
        let all = live(&w);
        match random.below(100) {
            0..8 if all.len() < 8 => {
                names += 1;
                come(&mut w, &mut random, names);
            }
            8..10 if all.len() > 2 => {
                if let Some(id) = random.pick(&all) {
                    w.kill(id);
                    w.millis(random.below(100));
                    w.give_back();
                }
            }
            10..35 => {
                if let Some(id) = random.pick(&all) {
                    grow(&mut w, &mut random, id);
                }
            }
            35..45 => {
                if let Some(id) = random.pick(&all) {
                    shrink(&mut w, &mut random, id);
                }
            }
            45..70 => {
                if let Some(id) = random.pick(&all) {
                    let busy = random.below(2) == 0;
                    w.busy(id, busy);
                }
            }
            70..74 => {
                if let Some(id) = random.pick(&all) {
                    w.evict(id);
                }
            }
            74..76 => {
                if let Some(id) = random.pick(&all) {
                    w.restore(id);
                }
            }
            76..79 if misbehaviour => {
                if let Some(id) = random.pick(&all) {
                    let modes = [Mode::Normal, Mode::Stopped, Mode::NeverIdle, Mode::Failing];
                    let mode = random.pick(&modes).expect("some");
                    w.process(id).mode = mode;
                }
            }
            _ => {}
        }
        check_waits(&w, &mut waits);
        let most = if random.below(10) == 0 { 400 } else { 30 };
        let steps = random.below(most);
        for _ in 0..steps {
            w.millis(10);
            check_waits(&w, &mut waits);
        }
    }
    finish(&mut w);
}

fn come(w: &mut World, random: &mut Random, name: u64) {
    let existing: Vec<WorkloadId> = w.arbiter.workload_ids().collect();
    let devices: Vec<DeviceId> = (0..w.rooms.len()).filter(|_| random.below(4) > 0).collect();
    if devices.is_empty() {
        return;
    }
    if random.below(4) == 0
        && let Some(workload) = random.pick(&existing)
    {
        let has: Vec<DeviceId> = w
            .arbiter
            .spec(workload)
            .expect("there")
            .quotas
            .keys()
            .copied()
            .collect();
        w.join(workload, &has);
        return;
    }
    let room = w.rooms.iter().copied().min().expect("one");
    let request = random.below(4) * room / 8;
    let limit = (request + bytes(random, room)).min(room);
    let mut spec = World::spec(&format!("w{name}"), request, limit, &devices);
    spec.priority = i32::try_from(random.below(3)).expect("small");
    if let Ok(workload) = w.arbiter.add_workload(w.now, spec, true) {
        let id = w.join(workload, &devices);
        w.process(id).swap_time = (10 + random.below(500)) * MILLISECOND;
    }
}

fn grow(w: &mut World, random: &mut Random, id: ProcessId) {
    let devices: Vec<DeviceId> = w.pages.0[&id].shares.keys().copied().collect();
    let device = random.pick(&devices).expect("some");
    let limit = w.arbiter.spec(w.workload(id)).expect("there").quotas[&device].limit;
    let bytes = bytes(random, (limit / 2).max(4 * MIB));
    let pinned = if random.below(20) == 0 {
        bytes.min(32 * MIB)
    } else {
        0
    };
    let no_wait = random.below(10) == 0;
    w.grow_on(id, device, bytes, pinned, no_wait);
}

fn shrink(w: &mut World, random: &mut Random, id: ProcessId) {
    let devices: Vec<DeviceId> = w.pages.0[&id].shares.keys().copied().collect();
    let device = random.pick(&devices).expect("some");
    let share = w.pages.0[&id].shares[&device];
    let pageable = share.used - share.pinned;
    if pageable >= 2 * MIB {
        let bytes = bytes(random, pageable);
        w.free(id, device, bytes);
    }
}

/// When all is quiet nothing moves, and everybody who is alone can have all of it.
fn finish(w: &mut World) {
    for id in live(w) {
        w.process(id).mode = Mode::Normal;
        w.busy(id, false);
    }
    w.millis(120_000);
    let before = w.notes.len();
    w.millis(5_000);
    assert_eq!(w.notes.len(), before, "something moves for nobody");
    for id in live(w) {
        if w.pages.0.contains_key(&id) {
            w.kill(id);
        }
    }
    w.give_back();
    for device in 0..w.rooms.len() {
        assert_eq!(w.arbiter.charged(device), 0, "bytes were lost");
    }
    assert_eq!(w.arbiter.workload_ids().count(), 0);
}

#[test]
fn invariants_hold_in_random_worlds() {
    let number = |name: &str| {
        std::env::var(name)
            .ok()
            .and_then(|text| text.parse::<u64>().ok())
    };
    if let Some(seed) = number("SPILLWAY_SEED") {
        return run(seed, 400);
    }
    for seed in 0..number("SPILLWAY_SEEDS").unwrap_or(40) {
        println!("SPILLWAY_SEED={seed}");
        run(seed, 400);
    }
}
