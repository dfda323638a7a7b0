//! Scenarios: who is moved, when, and for whom.

mod world;

use spillway_arbiter::*;
use world::*;

/// Three models as in the demo: each 1 GiB used of a request of 0.5 GiB, in a room of 2 GiB.
fn three_models() -> (World, [ProcessId; 3]) {
    let mut w = World::exact(&[2 * GIB]);
    let mut models = [ProcessId(0); 3];
    for (slot, name) in models.iter_mut().zip(["a", "b", "c"]) {
        let id = w.start(name, 512 * MIB, 1536 * MIB);
        w.overhead(id, 0, 64 * MIB);
        let ticket = w.grow(id, GIB);
        w.until(1_000, "loads its weights", |w| w.granted(id, ticket));
        w.busy(id, true);
        w.millis(300);
        w.busy(id, false);
        w.millis(300);
        *slot = id;
    }
    (w, models)
}

#[test]
fn three_models_in_turn_each_idle_one_leaves_for_the_next() {
    let (mut w, models) = three_models();
    for round in 0..4 {
        for id in models {
            w.busy(id, true);
            let waited = w.until(400, "comes back", |w| w.resident(id));
            assert!(
                waited <= 150,
                "one swap out and one in, {waited} ms in round {round}"
            );
            w.millis(300);
            w.busy(id, false);
            w.millis(300);
        }
    }
    let out: u64 = models.iter().map(|id| w.swaps_out(*id)).sum();
    let back: u64 = models.iter().map(|id| w.pages.0[id].swaps_in).sum();
    // Two came in while loading; then every request of another model costs one swap each way.
    assert!(
        out <= 2 + 12 && back <= 12,
        "{out} out, {back} in: more than needed"
    );
}

#[test]
fn an_idle_workload_stays_while_nobody_wants_its_space() {
    let mut w = World::exact(&[2 * GIB]);
    let a = w.start("a", GIB, 2 * GIB);
    w.take(a, 2 * GIB);
    w.millis(60_000);
    assert!(w.resident(a) && w.swaps_out(a) == 0);
}

#[test]
fn an_evicted_workload_stays_until_it_wants_back() {
    let mut w = World::exact(&[2 * GIB]);
    let a = w.start("a", GIB, GIB);
    w.take(a, GIB);
    w.evict(a);
    w.millis(10_000);
    assert_eq!(w.phase(a), Phase::Evicted);
    w.busy(a, true);
    w.until(200, "the next submit restores", |w| w.resident(a));
}

#[test]
fn two_busy_borrowers_take_turns_of_the_minimum_length() {
    let mut w = World::exact(&[GIB]);
    let a = w.start("a", 256 * MIB, GIB);
    let b = w.start("b", 256 * MIB, GIB);
    w.take(a, 768 * MIB);
    w.busy(a, true);
    w.millis(5_000);
    let ticket = w.grow(b, 768 * MIB);
    w.until(4_000, "b's growth", |w| w.granted(b, ticket));
    w.busy(b, true);
    let began = w.now;
    let ran = (w.pages.0[&a].ran, w.pages.0[&b].ran);
    w.millis(40_000);
    let passed = w.now - began;
    let (ran_a, ran_b) = (w.pages.0[&a].ran - ran.0, w.pages.0[&b].ran - ran.1);
    let turns = w.swaps_out(a) + w.swaps_out(b);
    assert!((17..=20).contains(&turns), "{turns} turns of 2.1 s in 40 s");
    let useful = (ran_a + ran_b) * 100 / passed;
    assert!(useful >= 90, "{useful} % of the time is useful");
    assert!(
        ran_a.abs_diff(ran_b) <= 4 * SECOND,
        "fair: {ran_a} and {ran_b}"
    );
}

#[test]
fn borrowers_that_fit_together_are_never_moved() {
    let mut w = World::exact(&[2 * GIB]);
    let a = w.start("a", 256 * MIB, GIB);
    let b = w.start("b", 256 * MIB, GIB);
    for id in [a, b] {
        w.take(id, GIB);
        w.busy(id, true);
    }
    w.millis(30_000);
    assert_eq!(w.swaps_out(a) + w.swaps_out(b), 0);
}

#[test]
fn a_borrower_leaves_promptly_when_a_neighbour_wants_its_own() {
    let mut w = World::exact(&[2 * GIB]);
    let borrower = w.start("borrower", 512 * MIB, 1536 * MIB);
    let owner = w.start("owner", GIB, GIB);
    w.take(borrower, 1536 * MIB);
    w.busy(borrower, true);
    w.millis(1_000);
    let ticket = w.grow(owner, GIB);
    let waited = w.until(1_000, "the owner's request", |w| w.granted(owner, ticket));
    assert!(
        waited <= 100,
        "{waited} ms: no turn protects a borrower from the owner"
    );
    w.busy(owner, true);
    w.millis(10_000);
    assert_eq!(w.phase(borrower), Phase::Evicted, "the owner is active");
    assert!(
        w.waits_for(borrower)
            .expect("waits")
            .contains("active within its request")
    );
    assert!(w.killed.is_empty());
    w.busy(owner, false);
    let back = w.until(600, "the borrower comes back", |w| w.resident(borrower));
    assert!(back >= 150, "not before the owner counts as idle");
    assert_eq!(w.phase(owner), Phase::Evicted);
    // And the owner gets its own back at once.
    w.busy(owner, true);
    w.until(200, "the owner is back", |w| w.resident(owner));
}

#[test]
fn an_active_owner_is_never_displaced_by_borrowing() {
    let mut w = World::exact(&[2 * GIB]);
    let owner = w.start("owner", GIB, GIB);
    let borrower = w.start("borrower", 512 * MIB, 2 * GIB);
    w.take(owner, GIB);
    w.busy(owner, true);
    w.take(borrower, GIB);
    w.busy(borrower, true);
    let ticket = w.grow(borrower, 512 * MIB);
    w.millis(11_000);
    assert!(matches!(
        w.answer(borrower, ticket),
        Some(Outcome::Waited(_))
    ));
    assert_eq!(w.swaps_out(owner), 0);
}

#[test]
fn idle_ones_leave_before_active_borrowers() {
    let mut w = World::exact(&[3 * GIB]);
    let active = w.start("active", 0, GIB);
    let idle = w.start("idle", GIB, GIB);
    let owner = w.start("owner", 2 * GIB, 2 * GIB);
    w.take(active, GIB);
    w.busy(active, true);
    w.take(idle, GIB);
    w.millis(5_000);
    let ticket = w.grow(owner, 2 * GIB);
    w.until(300, "granted", |w| w.granted(owner, ticket));
    assert_eq!(w.phase(idle), Phase::Evicted);
    assert_eq!(w.swaps_out(active), 0);
}

#[test]
fn among_the_idle_lower_priority_leaves_first_then_least_recently_active() {
    let mut w = World::exact(&[3 * GIB]);
    let mut high = World::spec("high", 0, GIB, &[0]);
    high.priority = 5;
    let high = w.start_spec(high);
    let old = w.start("old", 0, GIB);
    let recent = w.start("recent", 0, GIB);
    let owner = w.start("owner", 2 * GIB, 2 * GIB);
    for id in [high, old, recent] {
        w.take(id, GIB);
        w.busy(id, true);
        w.millis(500);
        w.busy(id, false);
        w.millis(500);
    }
    let first = w.grow(owner, GIB);
    w.until(300, "granted", |w| w.granted(owner, first));
    assert_eq!(w.phase(old), Phase::Evicted, "least recently active");
    let second = w.grow(owner, GIB);
    w.until(300, "granted", |w| w.granted(owner, second));
    assert_eq!(w.phase(recent), Phase::Evicted);
    assert!(w.resident(high), "priority");
}

#[test]
fn no_more_is_moved_than_needed() {
    let mut w = World::exact(&[4 * GIB]);
    let small = w.start("small", 0, GIB);
    let large = w.start("large", 0, 3 * GIB);
    w.take(small, 512 * MIB);
    w.busy(small, true);
    w.millis(300);
    w.busy(small, false);
    w.take(large, 3 * GIB);
    w.busy(large, true);
    w.millis(300);
    w.busy(large, false);
    w.millis(1_000);
    // The small one would leave first, but the large one is needed anyway.
    let owner = w.start("owner", 2 * GIB, 2 * GIB);
    let ticket = w.grow(owner, 2 * GIB);
    w.until(300, "granted", |w| w.granted(owner, ticket));
    assert_eq!(w.phase(large), Phase::Evicted);
    assert!(w.resident(small) && w.swaps_out(small) == 0);
}

#[test]
fn nobody_is_moved_for_a_waiter_that_would_not_fit_anyway() {
    let mut w = World::exact(&[2 * GIB]);
    let owner = w.start("owner", 1536 * MIB, 1536 * MIB);
    let idle = w.start("idle", 0, 256 * MIB);
    let borrower = w.start("borrower", 0, 2 * GIB);
    w.take(owner, 1536 * MIB);
    w.busy(owner, true);
    w.take(idle, 256 * MIB);
    w.millis(1_000);
    let ticket = w.grow(borrower, GIB);
    w.millis(5_000);
    assert_eq!(w.answer(borrower, ticket), None);
    assert_eq!(w.swaps_out(idle), 0, "its 256 MiB would not do");
}

#[test]
fn unused_grants_are_taken_back_before_anybody_moves() {
    let mut w = World::exact(&[2 * GIB]);
    let a = w.start("a", GIB, 2 * GIB);
    let b = w.start("b", GIB, GIB);
    w.take(a, 2 * GIB);
    w.free(a, 0, GIB);
    w.busy(a, true);
    w.millis(100);
    w.take(b, GIB);
    assert_eq!(w.swaps_out(a), 0);
}

#[test]
fn a_restore_needs_only_what_is_used() {
    let mut w = World::exact(&[2 * GIB]);
    let a = w.start("a", GIB, 2 * GIB);
    let b = w.start("b", GIB, GIB);
    w.take(a, 2 * GIB);
    w.evict(a);
    w.millis(100);
    assert_eq!(w.phase(a), Phase::Evicted);
    // Freed while evicted.
    w.free(a, 0, GIB);
    w.take(b, GIB);
    w.busy(b, true);
    w.busy(a, true);
    w.until(100, "fits beside b", |w| w.resident(a));
    assert_eq!(w.swaps_out(b), 0);
}

#[test]
fn growth_while_evicted_takes_quota_and_no_space() {
    let mut w = World::exact(&[2 * GIB]);
    let a = w.start("a", GIB, GIB);
    let b = w.start("b", GIB, 2 * GIB);
    w.take(a, 512 * MIB);
    w.evict(a);
    w.millis(100);
    w.take(b, 2 * GIB);
    w.busy(b, true);
    w.take(a, 512 * MIB);
    assert_eq!(w.phase(a), Phase::Evicted);
    let more = w.grow(a, 2 * MIB);
    assert!(
        matches!(w.answer(a, more), Some(Outcome::Limit(_))),
        "quota is quota"
    );
}

#[test]
fn pinned_growth_while_evicted_brings_the_workload_back_first() {
    let mut w = World::exact(&[2 * GIB]);
    let a = w.start("a", GIB, GIB);
    w.take(a, 512 * MIB);
    w.evict(a);
    w.millis(100);
    let ticket = w.grow_on(a, 0, 2 * MIB, 2 * MIB, false);
    assert_eq!(w.phase(a), Phase::Restoring, "it has to be on the device");
    w.until(200, "granted", |w| w.granted(a, ticket) && w.resident(a));
}

#[test]
fn a_waiting_growth_of_a_workload_that_is_evicted_is_served_as_quota() {
    let mut w = World::exact(&[2 * GIB]);
    let a = w.start("a", 512 * MIB, 1536 * MIB);
    let b = w.start("b", GIB, GIB);
    w.take(a, GIB);
    w.take(b, GIB);
    w.busy(b, true);
    let ticket = w.grow(a, 512 * MIB);
    w.millis(500);
    assert_eq!(w.answer(a, ticket), None, "waits for b");
    w.evict(a);
    w.until(200, "granted on the host", |w| w.granted(a, ticket));
    assert_eq!(w.phase(a), Phase::Evicted);
}

#[test]
fn never_is_never_moved_and_its_share_is_reserved() {
    let mut w = World::exact(&[2 * GIB]);
    let mut spec = World::spec("never", GIB, GIB, &[0]);
    spec.never = true;
    let never = w.start_spec(spec);
    let other = w.start("other", GIB, 2 * GIB);
    w.take(other, GIB);
    w.busy(other, true);
    let ticket = w.grow(other, 2 * MIB);
    assert!(
        matches!(w.answer(other, ticket), Some(Outcome::Never(_))),
        "the rest is reserved for ever"
    );
    w.take(never, GIB);
    w.millis(5_000);
    let operation = w.evict(never);
    assert!(w.operations[&operation].is_err());
    assert!(w.resident(never));
}

#[test]
fn never_gets_its_reservation_although_borrowers_were_there_first() {
    let mut w = World::exact(&[2 * GIB]);
    let borrower = w.start("borrower", 0, 2 * GIB);
    w.take(borrower, 2 * GIB);
    w.busy(borrower, true);
    let mut spec = World::spec("never", GIB, GIB, &[0]);
    spec.never = true;
    w.overcommitted = true;
    let never = w.start_spec(spec);
    let ticket = w.grow(never, GIB);
    w.until(300, "granted", |w| w.granted(never, ticket));
    w.overcommitted = false;
    assert_eq!(w.phase(borrower), Phase::Evicted);
}

#[test]
fn who_cannot_be_swapped_is_passed_over() {
    let mut w = World::exact(&[2 * GIB]);
    let fixed = w.start("fixed", 0, GIB);
    let idle = w.start("idle", 0, GIB);
    let owner = w.start("owner", GIB, GIB);
    w.take(fixed, GIB);
    w.process(fixed).unswappable = true;
    w.take(idle, GIB);
    w.millis(1_000);
    let ticket = w.grow(owner, GIB);
    w.until(300, "granted", |w| w.granted(owner, ticket));
    assert!(w.resident(fixed));
    assert_eq!(w.phase(idle), Phase::Evicted);
    let operation = w.evict(fixed);
    assert!(w.operations[&operation].is_err());
}

#[test]
fn several_processes_drain_together_before_anything_moves() {
    let mut w = World::exact(&[2 * GIB]);
    let one = w.start("ranks", GIB, 2 * GIB);
    let two = w.join(w.workload(one), &[0]);
    w.take(one, 512 * MIB);
    w.take(two, 512 * MIB);
    w.process(two).mode = Mode::Stopped;
    w.evict(one);
    w.millis(1_000);
    assert_eq!(w.phase(one), Phase::Draining);
    assert!(
        !w.pages.0[&one].on_host,
        "nothing moved before both are idle"
    );
    w.process(two).mode = Mode::Normal;
    w.until(300, "both out", |w| w.phase(one) == Phase::Evicted);
    assert!(w.pages.0[&one].on_host && w.pages.0[&two].on_host);
    w.busy(two, true);
    w.until(300, "both back", |w| w.resident(one));
    assert!(!w.pages.0[&one].on_host && !w.pages.0[&two].on_host);
}

#[test]
fn space_of_several_processes_is_free_only_when_all_are_out() {
    let mut w = World::exact(&[2 * GIB]);
    let one = w.start("ranks", 0, 2 * GIB);
    let two = w.join(w.workload(one), &[0]);
    w.take(one, GIB);
    w.take(two, GIB);
    w.process(two).swap_time = SECOND;
    let owner = w.start("owner", 512 * MIB, 512 * MIB);
    w.millis(1_000);
    let ticket = w.grow(owner, 512 * MIB);
    w.millis(500);
    assert!(w.pages.0[&one].on_host && !w.pages.0[&two].on_host);
    assert_eq!(w.answer(owner, ticket), None);
    w.until(1_000, "granted", |w| w.granted(owner, ticket));
}

#[test]
fn one_busy_rank_reopens_all_and_is_tried_again_later() {
    let mut w = World::exact(&[GIB]);
    let one = w.start("ranks", 0, GIB);
    let two = w.join(w.workload(one), &[0]);
    w.take(one, 512 * MIB);
    w.take(two, 512 * MIB);
    w.process(two).mode = Mode::NeverIdle;
    let owner = w.start("owner", 512 * MIB, 512 * MIB);
    w.millis(1_000);
    let ticket = w.grow(owner, 512 * MIB);
    w.until(300, "reopened", |w| {
        w.resident(one)
            && w.notes
                .iter()
                .any(|(_, _, n)| matches!(n, Note::Busy { .. }))
    });
    assert!(!w.pages.0[&one].closed && !w.pages.0[&two].closed);
    w.millis(500);
    let busy = |w: &World| {
        w.notes
            .iter()
            .filter(|(_, _, n)| matches!(n, Note::Busy { .. }))
            .count()
    };
    assert_eq!(busy(&w), 1, "not at once again");
    w.process(two).mode = Mode::Normal;
    w.until(2_000, "the second try", |w| w.granted(owner, ticket));
}

#[test]
fn who_never_drains_is_reported_and_killed_only_if_chosen() {
    for kill in [false, true] {
        let config = Config {
            kill_stuck: kill,
            ..Config::default()
        };
        let mut w = World::new(config, &[GIB]);
        let hog = w.start("hog", 0, GIB);
        w.take(hog, GIB);
        w.process(hog).mode = Mode::NeverIdle;
        w.busy(hog, true);
        let owner = w.start("owner", GIB, GIB);
        let ticket = w.grow(owner, GIB);
        w.millis(20_000);
        assert!(
            w.notes
                .iter()
                .any(|(_, _, n)| matches!(n, Note::Stuck { .. }))
        );
        assert_eq!(w.killed.contains(&hog), kill);
        assert_eq!(w.answer(owner, ticket), None, "still waiting, not refused");
        assert!(w.waits_for(owner).expect("waits").contains("hog"));
    }
}

#[test]
fn a_stopped_process_holds_nobody_but_itself() {
    let mut w = World::exact(&[2 * GIB]);
    let stopped = w.start("stopped", 0, GIB);
    let other = w.start("other", 0, GIB);
    w.take(stopped, GIB);
    w.millis(500);
    w.take(other, GIB);
    w.busy(other, true);
    w.process(stopped).mode = Mode::Stopped;
    let owner = w.start("owner", GIB, GIB);
    w.millis(500);
    let ticket = w.grow(owner, GIB);
    // The stopped one is idle and chosen first; when it does not answer, the other has to go.
    w.until(60_000, "granted", |w| w.granted(owner, ticket));
    assert_eq!(w.phase(other), Phase::Evicted);
    // When it goes on it finds itself running.
    w.process(stopped).mode = Mode::Normal;
    w.until(100, "runs on", |w| w.resident(stopped));
    assert_eq!(w.swaps_out(stopped), 0);
}

#[test]
fn a_failed_move_is_undone_and_said() {
    let mut w = World::exact(&[2 * GIB]);
    let a = w.start("a", GIB, GIB);
    w.take(a, GIB);
    w.process(a).mode = Mode::Failing;
    let operation = w.evict(a);
    w.until(300, "answered", |w| w.operations.contains_key(&operation));
    assert!(w.operations[&operation].is_err());
    w.until(100, "runs on", |w| w.resident(a));
}

#[test]
fn operators_override_activity_and_turns() {
    let mut w = World::exact(&[2 * GIB]);
    let a = w.start("a", GIB, GIB);
    w.take(a, GIB);
    w.busy(a, true);
    let operation = w.evict(a);
    w.until(200, "out", |w| w.operations.contains_key(&operation));
    assert_eq!(w.operations[&operation], Ok(true));
    assert_eq!(w.swaps_out(a), 1);
    // It keeps submitting: the next submit restores.
    w.until(200, "back", |w| w.resident(a));
}

#[test]
fn operators_requests_for_what_is_so_already_are_answered_at_once() {
    let mut w = World::exact(&[2 * GIB]);
    let a = w.start("a", GIB, GIB);
    w.take(a, GIB);
    let restore = w.restore(a);
    assert_eq!(w.operations[&restore], Ok(false));
    w.evict(a);
    w.millis(200);
    let evict = w.evict(a);
    assert_eq!(w.operations[&evict], Ok(false));
}

#[test]
fn operators_restore_brings_back_by_the_same_rules() {
    let mut w = World::exact(&[2 * GIB]);
    let a = w.start("a", 512 * MIB, 2 * GIB);
    let b = w.start("b", GIB, GIB);
    w.take(a, 1536 * MIB);
    w.evict(a);
    w.millis(200);
    w.take(b, GIB);
    w.busy(b, true);
    let restore = w.restore(a);
    w.millis(2_000);
    assert!(
        !w.operations.contains_key(&restore),
        "b is active within its request"
    );
    w.busy(b, false);
    w.until(600, "restored", |w| {
        w.operations.get(&restore) == Some(&Ok(true))
    });
    assert_eq!(w.phase(b), Phase::Evicted);
}

#[test]
fn an_eviction_asked_for_during_a_restore_follows_it() {
    let mut w = World::exact(&[2 * GIB]);
    let a = w.start("a", GIB, GIB);
    w.take(a, GIB);
    w.evict(a);
    w.millis(200);
    let restore = w.restore(a);
    assert_eq!(w.phase(a), Phase::Restoring);
    let evict = w.evict(a);
    w.until(500, "both", |w| w.operations.contains_key(&evict));
    assert_eq!(
        (&w.operations[&restore], &w.operations[&evict]),
        (&Ok(true), &Ok(true))
    );
    assert_eq!(w.phase(a), Phase::Evicted);
}

#[test]
fn memory_of_the_dead_is_granted_when_it_was_seen_free() {
    let mut w = World::exact(&[2 * GIB]);
    let a = w.start("a", GIB, 2 * GIB);
    let b = w.start("b", GIB, 2 * GIB);
    let idle = w.start("idle", 0, GIB);
    w.take(a, GIB);
    w.take(idle, GIB);
    w.millis(1_000);
    w.kill(a);
    let ticket = w.grow(b, GIB);
    w.millis(1_000);
    assert_eq!(w.answer(b, ticket), None);
    assert_eq!(
        w.swaps_out(idle),
        0,
        "space is on its way: nobody has to move"
    );
    w.give_back();
    assert!(w.granted(b, ticket));
}

#[test]
fn a_process_that_dies_in_the_middle_of_a_move_leaves_no_trace() {
    for millis in [1, 30, 60, 90] {
        let mut w = World::exact(&[2 * GIB]);
        let a = w.start("a", GIB, 2 * GIB);
        let b = w.start("b", GIB, GIB);
        w.take(a, 2 * GIB);
        w.millis(1_000);
        let ticket = w.grow(b, GIB);
        w.millis(millis);
        w.kill(a);
        w.millis(10);
        w.give_back();
        w.millis(10);
        assert!(w.granted(b, ticket));
        assert_eq!(w.arbiter.charged(0), GIB);
    }
}

#[test]
fn a_rank_that_dies_while_the_others_drained_lets_them_go_on() {
    let mut w = World::exact(&[2 * GIB]);
    let one = w.start("ranks", GIB, 2 * GIB);
    let two = w.join(w.workload(one), &[0]);
    w.take(one, 512 * MIB);
    w.take(two, 512 * MIB);
    w.process(two).mode = Mode::Stopped;
    let operation = w.evict(one);
    w.millis(100);
    w.kill(two);
    w.give_back();
    w.until(300, "the rest is out", |w| {
        w.operations.contains_key(&operation)
    });
    assert_eq!(w.phase(one), Phase::Evicted);
}

#[test]
fn a_waiting_operator_learns_that_the_workload_ended() {
    let mut w = World::exact(&[2 * GIB]);
    let a = w.start("a", GIB, GIB);
    w.take(a, GIB);
    let operation = w.evict(a);
    w.kill(a);
    assert!(w.operations[&operation].is_err());
}

#[test]
fn a_newcomer_of_an_evicted_workload_follows_it_and_comes_back_with_it() {
    let mut w = World::exact(&[2 * GIB]);
    let one = w.start("ranks", GIB, GIB);
    w.take(one, 512 * MIB);
    w.evict(one);
    w.millis(200);
    let two = w.join(w.workload(one), &[0]);
    w.millis(200);
    assert!(w.pages.0[&two].on_host);
    assert_eq!(
        w.phase(one),
        Phase::Evicted,
        "coming is no reason to bring all back"
    );
    w.take(two, 256 * MIB);
    w.busy(two, true);
    w.until(300, "both back", |w| w.resident(one));
    assert!(!w.pages.0[&one].on_host && !w.pages.0[&two].on_host);
}

#[test]
fn a_workload_on_two_devices_moves_as_a_whole() {
    let mut w = World::exact(&[2 * GIB, 2 * GIB]);
    let both = w.start_spec(World::spec("both", 0, 2 * GIB, &[0, 1]));
    w.take(both, GIB);
    let other = w.grow_on(both, 1, 2 * GIB, 0, false);
    assert!(w.granted(both, other));
    w.millis(500);
    let owner = w.start_spec(World::spec("owner", GIB, GIB, &[1]));
    let ticket = w.grow_on(owner, 1, GIB, 0, false);
    w.until(300, "granted", |w| w.granted(owner, ticket));
    assert_eq!(w.phase(both), Phase::Evicted);
    assert_eq!(w.arbiter.charged(0), 0);
    // It comes back only when both devices have space.
    w.busy(owner, true);
    w.busy(both, true);
    w.millis(3_000);
    assert_eq!(w.phase(both), Phase::Evicted);
    w.busy(owner, false);
    w.until(600, "back", |w| w.resident(both));
}

#[test]
fn a_victim_on_another_device_is_of_no_use() {
    let mut w = World::exact(&[GIB, GIB]);
    let elsewhere = w.start_spec(World::spec("elsewhere", 0, GIB, &[1]));
    let ticket = w.grow_on(elsewhere, 1, GIB, 0, false);
    assert!(w.granted(elsewhere, ticket));
    let here = w.start("here", 0, GIB);
    w.take(here, GIB);
    w.millis(1_000);
    let owner = w.start_spec(World::spec("owner", GIB, GIB, &[0]));
    let ticket = w.grow(owner, GIB);
    w.until(300, "granted", |w| w.granted(owner, ticket));
    assert_eq!(w.swaps_out(elsewhere), 0);
}

#[test]
fn with_oversubscription_even_guarantees_take_turns() {
    let config = Config {
        oversubscription: 2.0,
        slack: 0,
        ..Config::default()
    };
    let mut w = World::new(config, &[GIB]);
    let a = w.start("a", GIB, GIB);
    let b = w.start("b", GIB, GIB);
    w.take(a, GIB);
    w.busy(a, true);
    w.millis(3_000);
    let ticket = w.grow(b, GIB);
    w.until(3_000, "b", |w| w.granted(b, ticket));
    w.busy(b, true);
    w.millis(20_000);
    assert!(w.swaps_out(a) >= 4 && w.swaps_out(b) >= 4);
    assert!(w.swaps_out(a) + w.swaps_out(b) <= 11, "turns, no thrashing");
}

#[test]
fn a_large_borrower_is_not_starved_by_small_ones_that_take_turns() {
    let mut w = World::exact(&[3 * GIB]);
    let small: Vec<ProcessId> = (0..4)
        .map(|i| w.start(&format!("small{i}"), 0, GIB))
        .collect();
    let large = w.start("large", 0, 3 * GIB);
    w.take(large, 3 * GIB);
    w.evict(large);
    w.millis(200);
    for id in &small {
        w.grow(*id, GIB);
        w.busy(*id, true);
        w.millis(100);
    }
    w.millis(3_000);
    w.busy(large, true);
    w.until(30_000, "the large one gets its turn", |w| w.resident(large));
    w.millis(1_500);
    assert!(w.resident(large), "and keeps it for the turn");
    for id in &small {
        let id = *id;
        w.until(30_000, "the small ones, too", |w| w.resident(id));
    }
}

#[test]
fn low_priority_waits_longer_but_not_for_ever() {
    let mut w = World::exact(&[GIB]);
    let mut spec = World::spec("high", 0, GIB, &[0]);
    spec.priority = 9;
    let mut ids = Vec::new();
    for name in ["high1", "high2"] {
        spec.name = name.to_owned();
        ids.push(w.start_spec(spec.clone()));
    }
    ids.push(w.start("low", 0, GIB));
    for id in &ids {
        let ticket = w.grow(*id, 768 * MIB);
        let id = *id;
        w.until(20_000, "loads", |w| w.granted(id, ticket));
        w.busy(id, true);
    }
    let before: Vec<Nanos> = ids.iter().map(|id| w.pages.0[id].ran).collect();
    w.millis(60_000);
    let ran: Vec<Nanos> = ids
        .iter()
        .zip(before)
        .map(|(id, before)| w.pages.0[id].ran - before)
        .collect();
    assert!(ran[2] >= 5 * SECOND, "low ran {} of 60 s", ran[2] / SECOND);
    assert!(ran[0] > ran[2] && ran[1] > ran[2], "{ran:?}");
}

#[test]
fn resumed_processes_keep_what_they_hold() {
    let mut w = World::exact(&[2 * GIB]);
    w.arbiter.set_frozen(w.now, &mut w.pages, true);
    let resume = |evicted, grant| Resume {
        epoch: 40,
        evicted,
        evicting: false,
        grants: [(0, grant)].into(),
    };
    let there = w
        .arbiter
        .add_workload(w.now, World::spec("there", GIB, 2 * GIB, &[0]), false)
        .expect("in");
    let away = w
        .arbiter
        .add_workload(w.now, World::spec("away", GIB, GIB, &[0]), false)
        .expect("in");
    let there = w.join_as(there, &[0], Some(resume(false, 1536 * MIB)));
    let away = w.join_as(away, &[0], Some(resume(true, GIB)));
    assert_eq!(w.arbiter.account(there, 0).0, 1536 * MIB);
    assert_eq!(
        w.arbiter.process(there).map(|p| (p.order, p.epoch)),
        Some((Order::Run, 41))
    );
    assert_eq!(
        w.arbiter.process(away).map(|p| (p.order, p.epoch)),
        Some((Order::Evict, 41))
    );
    w.process(there)
        .shares
        .get_mut(&0)
        .expect("its device")
        .used = GIB;
    w.process(away).shares.get_mut(&0).expect("its device").used = GIB;
    w.busy(away, true);
    w.millis(100);
    assert_eq!(w.phase(away), Phase::Evicted, "frozen");
    w.arbiter.set_frozen(w.now, &mut w.pages, false);
    w.settle();
    w.millis(100);
    assert_eq!(
        w.arbiter.account(there, 0).0,
        1536 * MIB,
        "not lowered before it looks"
    );
    assert_eq!(w.phase(away), Phase::Evicted);
    w.arbiter.set_live(w.now, &mut w.pages, there);
    w.arbiter.set_live(w.now, &mut w.pages, away);
    w.until(300, "back beside the other", |w| w.resident(away));
    assert_eq!(w.arbiter.account(there, 0).0, GIB);
}

#[test]
fn a_resumed_workload_whose_request_no_longer_fits_runs_without_it() {
    let mut w = World::exact(&[GIB]);
    w.start("fresh", GIB, GIB);
    let spec = World::spec("old", GIB, GIB, &[0]);
    assert!(w.arbiter.add_workload(w.now, spec.clone(), true).is_err());
    let id = w
        .arbiter
        .add_workload(w.now, spec, false)
        .expect("taken in");
    let quota = w.arbiter.spec(id).expect("there").quotas[&0];
    assert_eq!(
        quota,
        Quota {
            request: 0,
            limit: GIB
        }
    );
}

#[test]
fn old_reports_end_nothing() {
    let mut w = World::exact(&[2 * GIB]);
    let a = w.start("a", GIB, GIB);
    w.take(a, GIB);
    w.evict(a);
    let epoch = w.arbiter.process(a).expect("there").epoch;
    w.arbiter
        .report(w.now, &mut w.pages, a, epoch - 1, Report::Evicted);
    w.arbiter
        .report(w.now, &mut w.pages, a, epoch + 1, Report::Evicted);
    w.settle();
    assert_eq!(w.phase(a), Phase::Evicting);
    w.until(200, "out", |w| w.phase(a) == Phase::Evicted);
}
