//! Scenarios: limits, growth, admission.

mod world;

use spillway_arbiter::*;
use world::*;

fn refused_by_limit(world: &World, id: ProcessId, ticket: u64) -> bool {
    matches!(world.answer(id, ticket), Some(Outcome::Limit(_)))
}

#[test]
fn with_request_and_limit_equal_exactly_the_rest_fits_and_one_granule_more_does_not() {
    let mut w = World::exact(&[2 * GIB]);
    let a = w.start("a", GIB, GIB);
    w.overhead(a, 0, 64 * MIB);
    w.take(a, 300 * MIB);
    let rest = GIB - 364 * MIB;
    let over = w.grow(a, rest + 2 * MIB);
    assert!(refused_by_limit(&w, a, over), "at once");
    w.take(a, rest);
    let more = w.grow(a, 2 * MIB);
    assert!(refused_by_limit(&w, a, more));
}

#[test]
fn slack_never_lets_a_workload_pass_its_limit() {
    let mut w = World::new(Config::default(), &[8 * GIB]);
    let a = w.start("a", GIB, GIB);
    w.take(a, MIB);
    let (grant, _) = w.arbiter.account(a, 0);
    assert_eq!(grant, 65 * MIB, "plenty of space: some slack");
    w.take(a, GIB - 2 * MIB);
    let (grant, _) = w.arbiter.account(a, 0);
    assert_eq!(grant, GIB);
}

#[test]
fn no_slack_where_space_is_short() {
    let mut w = World::new(Config::default(), &[GIB]);
    let a = w.start("a", 0, GIB);
    w.take(a, GIB - 100 * MIB);
    let (grant, _) = w.arbiter.account(a, 0);
    assert_eq!(grant, GIB - 100 * MIB);
}

#[test]
fn a_limit_is_refused_without_moving_anybody() {
    let mut w = World::exact(&[2 * GIB]);
    let a = w.start("a", GIB / 2, GIB);
    let b = w.start("b", GIB / 2, GIB);
    w.take(b, GIB);
    w.take(a, GIB);
    w.millis(1000);
    let more = w.grow(a, 2 * MIB);
    assert!(refused_by_limit(&w, a, more));
    w.millis(1000);
    assert!(w.resident(b) && w.swaps_out(b) == 0);
}

#[test]
fn measured_overhead_that_passes_the_limit_blocks_the_next_growth() {
    let mut w = World::exact(&[4 * GIB]);
    let a = w.start("a", GIB, GIB);
    w.take(a, GIB);
    w.overcommitted = true;
    w.overhead(a, 0, 100 * MIB);
    let more = w.grow(a, 2 * MIB);
    assert!(refused_by_limit(&w, a, more));
    w.free(a, 0, 200 * MIB);
    w.millis(30);
    // What it gave back it cannot just take again: together with the overhead it would be too much.
    w.overcommitted = false;
    assert_eq!(w.arbiter.account(a, 0).0, GIB - 100 * MIB);
    w.take(a, 100 * MIB);
}

#[test]
fn freed_memory_can_be_taken_again_without_asking() {
    let mut w = World::exact(&[2 * GIB]);
    let a = w.start("a", GIB, GIB);
    w.take(a, 500 * MIB);
    w.free(a, 0, 200 * MIB);
    let (grant, _) = w.arbiter.account(a, 0);
    assert_eq!(grant, 500 * MIB, "nobody needs it: it stays");
}

#[test]
fn siblings_share_a_limit_and_unused_grants_are_gathered() {
    let mut w = World::exact(&[4 * GIB]);
    let a = w.start("a", GIB, GIB);
    let b = w.join(w.workload(a), &[0]);
    w.take(a, 700 * MIB);
    w.free(a, 0, 600 * MIB);
    w.millis(100);
    // Of the 700 MiB that a was granted it uses 100: the rest is b's to have.
    let all = w.grow(b, 924 * MIB);
    w.millis(60);
    assert!(w.granted(b, all));
    let more = w.grow(b, 2 * MIB);
    w.millis(60);
    assert!(refused_by_limit(&w, b, more));
}

#[test]
fn a_fresh_grant_is_not_gathered_before_its_owner_could_take_it() {
    let mut w = World::exact(&[4 * GIB]);
    let a = w.start("a", GIB, GIB);
    let b = w.join(w.workload(a), &[0]);
    w.take(a, 600 * MIB);
    // a has been told and has not taken it yet.
    w.free(a, 0, 600 * MIB);
    let ticket = w.grow(b, 600 * MIB);
    assert_eq!(w.answer(b, ticket), None, "put off, not refused");
    // Now a takes it.
    w.process(a).shares.get_mut(&0).expect("its device").used = 600 * MIB;
    w.millis(60);
    assert!(
        refused_by_limit(&w, b, ticket),
        "refused once it is certain"
    );
}

#[test]
fn a_grant_that_its_owner_gave_up_goes_to_the_sibling() {
    let mut w = World::exact(&[4 * GIB]);
    let a = w.start("a", GIB, GIB);
    let b = w.join(w.workload(a), &[0]);
    w.take(a, 600 * MIB);
    w.free(a, 0, 600 * MIB);
    let ticket = w.grow(b, 600 * MIB);
    w.millis(60);
    assert!(w.granted(b, ticket));
}

#[test]
fn threads_that_ask_at_once_each_get_their_own() {
    let mut w = World::exact(&[4 * GIB]);
    let a = w.start("a", GIB, GIB);
    // Four threads ask before any of them has taken anything.
    for thread in 0..4u64 {
        let growth = Growth {
            process: a,
            ticket: 1000 + thread,
            device: 0,
            bytes: 256 * MIB,
            pinned: 0,
            no_wait: false,
        };
        w.arbiter.grow(w.now, &mut w.pages, growth);
    }
    let (grant, _) = w.arbiter.account(a, 0);
    assert_eq!(grant, GIB);
    let granted = w
        .arbiter
        .take_actions()
        .into_iter()
        .filter(|action| {
            matches!(
                action,
                Action::Grown {
                    outcome: Outcome::Granted,
                    ..
                }
            )
        })
        .count();
    assert_eq!(granted, 4);
}

#[test]
fn requests_that_make_no_sense_are_invalid() {
    let mut w = World::exact(&[2 * GIB]);
    let a = w.start("a", GIB, GIB);
    for (device, bytes, pinned) in [(0, 0, 0), (7, MIB, 0), (0, MIB, 2 * MIB)] {
        let ticket = w.grow_on(a, device, bytes, pinned, false);
        assert!(matches!(w.answer(a, ticket), Some(Outcome::Invalid(_))));
    }
    let absurd = w.grow(a, u64::MAX);
    assert!(refused_by_limit(&w, a, absurd));
}

#[test]
fn growth_above_the_request_waits_and_is_then_refused() {
    let mut w = World::exact(&[2 * GIB]);
    let a = w.start("a", GIB, 2 * GIB);
    let b = w.start("b", GIB, GIB);
    w.take(b, GIB);
    w.busy(b, true);
    w.take(a, GIB);
    w.busy(a, true);
    let ticket = w.grow(a, 512 * MIB);
    w.millis(9_900);
    assert_eq!(w.answer(a, ticket), None);
    assert!(
        w.waits_for(a)
            .expect("waits")
            .contains("active within its request")
    );
    w.millis(200);
    assert!(matches!(w.answer(a, ticket), Some(Outcome::Waited(_))));
    assert_eq!(w.swaps_out(b), 0, "the neighbour did not notice");
}

#[test]
fn growth_above_the_request_goes_on_when_the_neighbour_idles() {
    let mut w = World::exact(&[2 * GIB]);
    let a = w.start("a", GIB, 2 * GIB);
    let b = w.start("b", GIB, GIB);
    w.take(b, GIB);
    w.busy(b, true);
    w.take(a, GIB);
    let ticket = w.grow(a, 512 * MIB);
    w.millis(3_000);
    w.busy(b, false);
    w.until(500, "granted after b idles", |w| w.granted(a, ticket));
    assert_eq!(w.phase(b), Phase::Evicted);
}

#[test]
fn no_wait_is_answered_at_once() {
    let mut w = World::exact(&[2 * GIB]);
    let a = w.start("a", GIB, 2 * GIB);
    let b = w.start("b", GIB, GIB);
    w.take(b, GIB);
    w.millis(1000);
    let yes = w.grow_on(a, 0, GIB, 0, true);
    assert!(w.granted(a, yes), "from what is free");
    let no = w.grow_on(a, 0, MIB * 2, 0, true);
    assert!(matches!(w.answer(a, no), Some(Outcome::Waited(_))));
}

#[test]
fn growth_after_which_a_neighbour_could_not_run_is_never_granted() {
    let mut w = World::exact(&[2 * GIB]);
    let a = w.start("a", 512 * MIB, 2 * GIB);
    let b = w.start("b", GIB, GIB);
    // Pinned memory cannot be moved out of b's way: b could never have its request again.
    let ticket = w.grow_on(a, 0, 1536 * MIB, 1536 * MIB, false);
    assert!(matches!(w.answer(a, ticket), Some(Outcome::Never(_))));
    // The same as pageable memory is only lent.
    w.take(a, 1536 * MIB);
    let _ = b;
}

#[test]
fn growth_after_which_it_could_not_run_itself_is_never_granted() {
    let mut w = World::exact(&[2 * GIB]);
    let a = w.start("a", 512 * MIB, 2 * GIB);
    let b = w.start("b", GIB, GIB);
    let pinned = w.grow_on(b, 0, 600 * MIB, 600 * MIB, false);
    assert!(w.granted(b, pinned));
    w.take(a, GIB);
    let ticket = w.grow(a, 500 * MIB);
    assert!(matches!(w.answer(a, ticket), Some(Outcome::Never(_))));
}

#[test]
fn pinned_growth_within_the_request_is_granted() {
    let mut w = World::exact(&[2 * GIB]);
    let a = w.start("a", GIB, GIB);
    let b = w.start("b", GIB, 2 * GIB);
    w.take(b, 2 * GIB);
    w.millis(1000);
    let ticket = w.grow_on(a, 0, GIB, GIB, false);
    w.until(300, "b makes room", |w| w.granted(a, ticket));
}

#[test]
fn growth_within_the_request_is_refused_only_where_no_device_could_hold_it() {
    let mut w = World::exact(&[GIB]);
    let a = w.start("a", GIB, GIB);
    let b = w.start("b", 0, GIB);
    // Contexts of b that nobody promised anything for.
    w.overcommitted = true;
    w.overhead(b, 0, 200 * MIB);
    let ticket = w.grow(a, GIB);
    w.millis(9_000);
    assert_eq!(w.answer(a, ticket), None, "b's overhead may go away");
    w.millis(2_000);
    assert!(matches!(w.answer(a, ticket), Some(Outcome::Waited(_))));
    w.take(a, 800 * MIB);
}

#[test]
fn requests_are_admitted_up_to_the_room_and_refused_with_the_numbers() {
    let mut w = World::exact(&[2 * GIB]);
    w.start("a", GIB, GIB);
    w.start("b", 1024 * MIB, GIB);
    let text = w
        .arbiter
        .add_workload(w.now, World::spec("c", MIB, MIB, &[0]), true)
        .expect_err("full");
    assert!(text.contains("1 MiB") && text.contains("2 GiB"), "{text}");
    // Without a request it may come.
    w.start("c", 0, 2 * GIB);
}

#[test]
fn oversubscription_admits_more_but_not_for_those_who_never_move() {
    let config = Config {
        oversubscription: 1.5,
        ..Config::default()
    };
    let mut w = World::new(config, &[2 * GIB]);
    w.start("a", 2 * GIB, 2 * GIB);
    w.start("b", GIB, GIB);
    let mut spec = World::spec("c", MIB, MIB, &[0]);
    assert!(w.arbiter.add_workload(w.now, spec.clone(), true).is_err());
    spec.never = true;
    assert!(w.arbiter.add_workload(w.now, spec, true).is_err());
}

#[test]
fn what_settings_mean() {
    let room = 10 * GIB;
    let quota = |request, limit, never| effective_quota(request, limit, never, room);
    let is = |request, limit| Ok(Quota { request, limit });
    assert_eq!(quota(None, None, false), is(0, room));
    assert_eq!(quota(Some(GIB), None, false), is(GIB, GIB));
    assert_eq!(quota(None, Some(GIB), false), is(GIB, GIB));
    assert_eq!(quota(Some(GIB), Some(20 * GIB), false), is(GIB, room));
    assert_eq!(quota(None, Some(20 * GIB), false), is(room, room));
    assert_eq!(quota(Some(GIB), Some(2 * GIB), true), is(2 * GIB, 2 * GIB));
    assert!(quota(Some(2 * GIB), Some(GIB), false).is_err_and(|t| t.contains("SPILLWAY_REQUEST")));
    assert!(quota(Some(11 * GIB), None, false).is_err_and(|t| t.contains("10 GiB")));
}

#[test]
fn devices_are_separate() {
    let mut w = World::exact(&[GIB, GIB]);
    let a = w.start_spec(World::spec("a", 512 * MIB, GIB, &[0, 1]));
    w.take(a, GIB);
    let other = w.grow_on(a, 1, GIB, 0, false);
    assert!(w.granted(a, other), "the other device is its own");
    let more = w.grow_on(a, 1, 2 * MIB, 0, false);
    assert!(refused_by_limit(&w, a, more));
}

#[test]
fn memory_of_strangers_is_not_granted() {
    let mut w = World::exact(&[2 * GIB]);
    let a = w.start("a", GIB, 2 * GIB);
    w.arbiter.set_external(0, 1536 * MIB);
    w.take(a, 512 * MIB);
    let ticket = w.grow(a, 512 * MIB);
    assert_eq!(w.answer(a, ticket), None, "within its request: it waits");
    w.arbiter.set_external(0, 0);
    w.tick();
    assert!(w.granted(a, ticket));
}

#[test]
fn nothing_is_granted_while_frozen_and_everything_after() {
    let mut w = World::exact(&[2 * GIB]);
    let a = w.start("a", GIB, GIB);
    w.arbiter.set_frozen(w.now, &mut w.pages, true);
    let ticket = w.grow(a, GIB);
    let over = w.grow(a, 2 * GIB);
    assert_eq!(w.answer(a, ticket), None);
    assert!(refused_by_limit(&w, a, over), "what is certain is said");
    w.arbiter.set_frozen(w.now, &mut w.pages, false);
    w.settle();
    assert!(w.granted(a, ticket));
}
