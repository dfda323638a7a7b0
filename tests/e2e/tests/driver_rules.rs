//! The driver's rules still hold for a program under Spillway: `tests/conformance`, case by case,
//! with the library preloaded, a coordinator, and memory that is Spillway's to move.

#[path = "support/rules.rs"]
mod rules;

#[test]
fn programs_under_spillway_see_the_drivers_rules() {
    rules::hold("driver-rules", |place| place.library());
}

/// The same with every name of the driver's exported by us.
#[test]
fn programs_in_strict_mode_see_the_drivers_rules() {
    rules::hold("strict-rules", |place| place.strict_library());
}
