//! The driver's rules still hold for a program under Spillway: `tests/conformance`, case by case,
//! with the library preloaded, a coordinator, and memory that is Spillway's to move.

#[path = "support/rules.rs"]
mod rules;

#[test]
fn programs_under_spillway_see_the_drivers_rules() {
    rules::hold("driver-rules", |place| place.library());
}
