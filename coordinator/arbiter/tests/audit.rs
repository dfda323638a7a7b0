//! What is an escape and what is not, in scenarios.

use spillway_arbiter::audit::{
    Audit, CONFIRM, Escape, Member, NEVER_STILL, RETURN_WITHIN, Shown, TOLERANCE, UNSEEN_AFTER,
    Who, overhead,
};
use spillway_arbiter::{MILLISECOND, Nanos, ProcessId, SECOND, WorkloadId};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn stranger(pid: i32, born: u64, bytes: u64) -> Shown {
    Shown {
        pid,
        device: 0,
        bytes: Some(bytes),
        who: Who::Stranger {
            born,
            may_return: false,
        },
    }
}

/// Process `number` of workload 1, with a limit of 1 GiB.
fn member(number: u64, shown: u64, held: Option<u64>) -> Shown {
    Shown {
        pid: i32::try_from(number).expect("small"),
        device: 0,
        bytes: Some(shown),
        who: Who::Member(Member {
            process: ProcessId(number),
            workload: WorkloadId(1),
            limit: GIB,
            held,
            maybe: 0,
            covered: 0,
            asked: false,
        }),
    }
}

fn change(mut shown: Shown, change: impl FnOnce(&mut Member)) -> Shown {
    if let Who::Member(member) = &mut shown.who {
        change(member);
    }
    shown
}

/// Samples every 100 ms of the same; when the first escape is told, and which.
fn until(audit: &mut Audit, from: Nanos, to: Nanos, shown: &[Shown]) -> Option<(Nanos, Escape)> {
    let mut at = from;
    while at <= to {
        let escapes = audit.look(at, true, shown);
        if let [first, rest @ ..] = escapes.as_slice() {
            assert!(rest.is_empty(), "{escapes:?}");
            return Some((at, *first));
        }
        at += 100 * MILLISECOND;
    }
    None
}

#[test]
fn a_stranger_is_told_by_the_second_sample_and_once() {
    let mut audit = Audit::default();
    let who = [stranger(7, 1, 64 * MIB)];
    assert_eq!(audit.look(SECOND, true, &who), []);
    assert_eq!(audit.look_again_at(), SECOND + CONFIRM);
    assert_eq!(audit.strangers().count(), 0, "not confirmed");
    let told = Escape::Stranger {
        pid: 7,
        born: 1,
        bytes: 64 * MIB,
    };
    assert_eq!(audit.look(2 * SECOND, true, &who), [told]);
    assert_eq!(audit.look_again_at(), Nanos::MAX);
    assert_eq!(until(&mut audit, 2 * SECOND, 60 * SECOND, &who), None);
    assert_eq!(audit.strangers().collect::<Vec<_>>(), [(7, 1)]);
    assert_eq!(audit.look(61 * SECOND, true, &[]), []);
    assert_eq!(audit.strangers().count(), 0, "it has ended");
}

#[test]
fn several_devices_are_one_stranger() {
    let mut audit = Audit::default();
    let mut second = stranger(7, 1, 32 * MIB);
    second.device = 1;
    let who = [stranger(7, 1, 64 * MIB), second];
    let (_, escape) = until(&mut audit, 0, 5 * SECOND, &who).expect("told");
    let Escape::Stranger { bytes, .. } = escape else {
        panic!("{escape:?}");
    };
    assert_eq!(bytes, 96 * MIB);
}

#[test]
fn processes_that_come_and_go_under_one_number_are_not_one() {
    let mut audit = Audit::default();
    for round in 0..50 {
        let who = [stranger(7, round, GIB)];
        assert_eq!(audit.look(round * SECOND, true, &who), [], "{round}");
    }
}

#[test]
fn a_gap_begins_anew() {
    let mut audit = Audit::default();
    let who = [stranger(7, 1, GIB)];
    for round in 0..50 {
        let at = round * SECOND;
        assert_eq!(audit.look(at, true, &who), []);
        assert_eq!(audit.look(at + SECOND / 2, true, &[]), []);
    }
}

#[test]
fn who_has_the_library_may_come_back() {
    let mut audit = Audit::default();
    let mut who = stranger(7, 1, GIB);
    who.who = Who::Stranger {
        born: 1,
        may_return: true,
    };
    let (at, _) = until(&mut audit, 0, 60 * SECOND, &[who]).expect("told");
    assert_eq!(at, RETURN_WITHIN);
}

#[test]
fn nobody_is_accused_before_the_adoption_window_is_over() {
    let mut audit = Audit::default();
    let who = [stranger(7, 1, GIB), member(8, 3 * GIB, Some(GIB))];
    for at in 0..60 {
        assert_eq!(audit.look(at * SECOND, false, &who), []);
    }
    assert_eq!(
        audit.look(60 * SECOND, true, &who),
        [],
        "what was before does not count"
    );
    assert_eq!(audit.look(61 * SECOND, true, &who).len(), 2);
}

#[test]
fn the_excused_are_excused() {
    let mut audit = Audit::default();
    let mut who = stranger(1, 1, GIB);
    who.who = Who::Excused;
    assert_eq!(until(&mut audit, 0, 60 * SECOND, &[who]), None);
    who.who = Who::Unseen;
    let (at, escape) = until(&mut audit, 0, 60 * SECOND, &[who]).expect("told");
    assert_eq!((at, escape), (UNSEEN_AFTER, Escape::Unseen { pid: 1 }));
}

#[test]
fn a_workload_within_its_limit_is_left_alone_whatever_it_does() {
    let mut audit = Audit::default();
    // Random walks below the limit, overhead included, with measurements asked for or not.
    let mut random = 0x1234_5678_9abc_def1u64;
    let mut next = |most: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % (most + 1)
    };
    for step in 0..10_000 {
        let overhead = 64 * MIB + next(TOLERANCE);
        let held = next(GIB - overhead);
        let still = next(1) == 0;
        let shown = if still { held + overhead } else { next(GIB) };
        let entry = change(member(8, shown, still.then_some(held)), |m| {
            m.asked = next(9) == 0;
        });
        let escapes = audit.look(step * 300 * MILLISECOND, true, &[entry]);
        assert_eq!(escapes, [], "step {step}");
    }
}

#[test]
fn code_that_comes_late_may_pass_a_full_limit_by_the_tolerance() {
    let mut audit = Audit::default();
    let edge = GIB + TOLERANCE;
    let held = Some(GIB - 64 * MIB);
    let asked = |entry| change(entry, |m| m.asked = true);
    let fine = asked(member(8, edge, held));
    assert_eq!(until(&mut audit, 0, 60 * SECOND, &[fine]), None);
    let more = asked(member(8, edge + 1, held));
    let (at, escape) = until(&mut audit, 0, 60 * SECOND, &[more]).expect("told");
    assert_eq!(at, CONFIRM);
    let told = Escape::Limit {
        workload: WorkloadId(1),
        device: 0,
        bytes: edge + 1,
        limit: GIB,
        process: ProcessId(8),
    };
    assert_eq!(escape, told);
    let again = until(&mut audit, 60 * SECOND, 90 * SECOND, &[more]);
    assert_eq!(again, None, "told once");
    assert_eq!(until(&mut audit, 91 * SECOND, 92 * SECOND, &[fine]), None);
    let again = until(&mut audit, 93 * SECOND, 95 * SECOND, &[more]);
    assert!(again.is_some(), "after it was over, told again");
}

#[test]
fn the_processes_of_a_workload_count_together() {
    let mut audit = Audit::default();
    let half = 700 * MIB;
    let both = [member(8, half, Some(half)), member(9, half, Some(half))];
    let (_, escape) = until(&mut audit, 0, 5 * SECOND, &both).expect("told");
    let Escape::Limit { bytes, .. } = escape else {
        panic!("{escape:?}");
    };
    assert_eq!(bytes, 2 * half);
    // Of different workloads they are nothing to each other.
    let mut audit = Audit::default();
    let other = change(both[1], |m| m.workload = WorkloadId(2));
    assert_eq!(until(&mut audit, 0, 60 * SECOND, &[both[0], other]), None);
}

#[test]
fn moving_memory_is_no_escape_but_moving_for_ever_is() {
    let mut audit = Audit::default();
    let moving = [member(8, 3 * GIB, None)];
    let (at, escape) = until(&mut audit, 0, 60 * SECOND, &moving).expect("told");
    assert_eq!(at, NEVER_STILL);
    assert!(matches!(escape, Escape::Limit { .. }));
    let mut audit = Audit::default();
    let fine = [member(8, GIB, Some(GIB))];
    for round in 0..20 {
        let at = round * 10 * SECOND;
        assert_eq!(until(&mut audit, at, at + 9 * SECOND, &moving), None);
        assert_eq!(audit.look(at + 9 * SECOND + SECOND / 2, true, &fine), []);
    }
}

#[test]
fn what_others_are_charged_for_is_not_ones_own() {
    let mut audit = Audit::default();
    let imports = change(member(8, 3 * GIB, Some(GIB)), |m| {
        m.covered = 2 * GIB;
        m.maybe = 2 * GIB;
    });
    assert_eq!(until(&mut audit, 0, 60 * SECOND, &[imports]), None);
}

#[test]
fn memory_that_the_driver_may_or_may_not_count_is_no_overhead() {
    assert_eq!(overhead(64 * MIB, 64 * MIB, 0), 64 * MIB);
    assert_eq!(overhead(64 * MIB, 80 * MIB, 0), 80 * MIB, "code was loaded");
    assert_eq!(overhead(64 * MIB, 564 * MIB, 512 * MIB), 64 * MIB);
    assert_eq!(overhead(64 * MIB, 64 * MIB, 512 * MIB), 64 * MIB);
    assert_eq!(overhead(64 * MIB, 32 * MIB, 512 * MIB), 32 * MIB);
    assert_eq!(overhead(64 * MIB, 600 * MIB, 512 * MIB), 88 * MIB);
    assert_eq!(overhead(0, 64 * MIB, u64::MAX), 0);

    let mut audit = Audit::default();
    let imports = |shown, maybe| {
        change(member(8, shown, Some(64 * MIB)), |m| {
            m.limit = 64 * GIB;
            m.maybe = maybe;
        })
    };
    let steps = [
        imports(128 * MIB, 0),
        imports(128 * MIB, GIB),
        imports(128 * MIB + GIB, GIB),
        imports(500 * MIB, GIB),
        imports(128 * MIB, 0),
    ];
    let mut at = 0;
    for step in steps.into_iter().cycle().take(100) {
        assert_eq!(until(&mut audit, at, at + 5 * SECOND, &[step]), None);
        at += 6 * SECOND;
    }
    // One that is gone by the process's account and not by the driver's.
    let hidden = [imports(128 * MIB + GIB, 0)];
    let (_, escape) = until(&mut audit, at, at + 5 * SECOND, &hidden).expect("told");
    assert!(matches!(escape, Escape::Uncharged { bytes: GIB, .. }));
}

#[test]
fn overhead_that_grows_without_a_reason_is_told() {
    let mut audit = Audit::default();
    let free = |shown, held| {
        let no_limit = |m: &mut Member| m.limit = 64 * GIB;
        change(member(8, shown, Some(held)), no_limit)
    };
    let before = free(GIB + 64 * MIB, GIB);
    assert_eq!(until(&mut audit, 0, 10 * SECOND, &[before]), None);
    // It holds less by its own account and shows as much: something is hidden.
    let after = free(GIB + 64 * MIB, 512 * MIB);
    let (at, escape) = until(&mut audit, 20 * SECOND, 30 * SECOND, &[after]).expect("told");
    assert_eq!(at, 20 * SECOND + CONFIRM);
    let told = Escape::Uncharged {
        process: ProcessId(8),
        device: 0,
        bytes: 512 * MIB,
    };
    assert_eq!(escape, told);
    assert_eq!(until(&mut audit, 31 * SECOND, 60 * SECOND, &[after]), None);
    // A context explains any growth, also if the first measurement after it does not count.
    let asked = change(free(4 * GIB, 0), |m| {
        m.asked = true;
        m.held = None;
    });
    assert_eq!(audit.look(61 * SECOND, true, &[asked]), []);
    let context = [free(4 * GIB, 0)];
    assert_eq!(until(&mut audit, 62 * SECOND, 90 * SECOND, &context), None);
}

#[test]
fn a_driver_that_says_nothing_of_a_process_accuses_nobody() {
    let mut audit = Audit::default();
    let mut entry = member(8, 0, Some(64 * GIB));
    entry.bytes = None;
    assert_eq!(until(&mut audit, 0, 60 * SECOND, &[entry]), None);
    let mut unknown = stranger(7, 1, 0);
    unknown.bytes = None;
    let (_, escape) = until(&mut audit, 0, 60 * SECOND, &[unknown]).expect("there all the same");
    assert!(matches!(escape, Escape::Stranger { bytes: 0, .. }));
}
