use super::*;

fn plain(device: usize, bytes: u64) -> Vec<Ended> {
    vec![Ended {
        charge: (device, bytes),
        exported: false,
        covered: 0,
    }]
}

#[test]
fn create_map_release_stays_charged_until_unmapped() {
    let mut handles = Handles::default();
    handles.created(7, (0, 100));
    handles.mapped(0x1000, 7);
    assert_eq!(handles.released(7), vec![]);
    assert_eq!(handles.unmapped(0x1000, 0x1000), plain(0, 100));
    assert_eq!(handles.unmapped(0x1000, 0x1000), vec![]);
}

#[test]
fn a_retained_reference_keeps_the_charge() {
    let mut handles = Handles::default();
    handles.created(7, (0, 100));
    handles.mapped(0x1000, 7);
    handles.retained(0x1800, 7);
    assert_eq!(handles.released(7), vec![]);
    assert_eq!(handles.unmapped(0, 0x10000), vec![]);
    assert_eq!(handles.released(7), plain(0, 100));
    assert_eq!(
        handles.released(7),
        vec![],
        "a release too many is the driver's to refuse"
    );
}

#[test]
fn a_reused_handle_value_is_another_memory() {
    let mut handles = Handles::default();
    handles.created(7, (0, 100));
    handles.mapped(0x1000, 7);
    assert_eq!(handles.released(7), vec![]);
    handles.created(7, (0, 50));
    assert_eq!(handles.released(7), plain(0, 50));
    assert_eq!(handles.unmapped(0x1000, 1), plain(0, 100));
}

#[test]
fn an_export_is_remembered_to_the_end() {
    let mut handles = Handles::default();
    handles.created(7, (0, 100));
    assert_eq!(handles.exported(7, None), Some((0, 100)));
    assert_eq!(handles.exported(7, None), None, "once is enough");
    assert_eq!(
        handles.released(7),
        vec![Ended {
            charge: (0, 100),
            exported: true,
            covered: 0
        }]
    );
}

#[test]
fn an_open_descriptor_keeps_the_memory_and_its_charge() {
    let descriptor = |number| Descriptor {
        number,
        file: (1, 2),
    };
    let mut handles = Handles::default();
    handles.created(7, (0, 100));
    handles.exported(7, Some(descriptor(3)));
    assert_eq!(handles.released(7), vec![]);
    // It comes back by the descriptor, under another handle: the same memory, charged once.
    handles.imported(9, 0, Some(descriptor(3)));
    assert_eq!(handles.unsized_import(9), None);
    assert_eq!(handles.released(9), vec![]);
    assert_eq!(handles.descriptors_closed(|_| true), vec![]);
    let ended = handles.descriptors_closed(|_| false);
    assert_eq!((ended[0].charge, ended[0].exported), ((0, 100), true));
}

#[test]
fn an_import_is_charged_from_its_first_mapping() {
    let mut handles = Handles::default();
    handles.imported(7, 1, None);
    assert_eq!(handles.unsized_import(7), Some(1));
    handles.sized(7, 100, 0);
    handles.mapped(0x1000, 7);
    assert_eq!(handles.unsized_import(7), None);
    assert_eq!(handles.released(7), vec![]);
    let ended = handles.unmapped(0x1000, 1);
    assert_eq!((ended[0].charge, ended[0].covered), ((1, 100), 0));
    handles.imported(8, 1, None);
    assert_eq!(
        handles.released(8),
        vec![],
        "never mapped, nothing was charged"
    );
}

#[test]
fn an_import_that_somebody_else_is_charged_for_ends_uncharged() {
    let mut handles = Handles::default();
    handles.imported(7, 1, None);
    handles.sized(7, 0, 100);
    assert_eq!(handles.exported(7, None), None, "not ours to answer for");
    let ended = handles.released(7);
    assert_eq!((ended[0].charge, ended[0].covered), ((1, 0), 100));
}

#[test]
fn what_is_bound_to_a_multicast_object_stays_until_unbound() {
    let mut handles = Handles::default();
    handles.created(1, (0, 0));
    handles.created(7, (0, 100));
    handles.created(8, (1, 50));
    handles.mapped(0x1000, 8);
    handles.bound(1, 0, 100, Some(7), 0);
    handles.bound(1, 200, 50, None, 0x1000);
    assert_eq!(handles.released(7), vec![]);
    assert_eq!(handles.unbound(1, 0, 100), plain(0, 100));
    assert_eq!(handles.released(8), vec![]);
    assert_eq!(handles.unmapped(0x1000, 1), vec![]);
    assert_eq!(
        handles.released(1),
        plain(1, 50),
        "the object's end lets go of it"
    );
}

#[test]
fn an_ipc_handle_is_charged_until_closed_as_often_as_opened() {
    let mut handles = Handles::default();
    assert_eq!(handles.open_again(0x1000), None);
    let import = (0, 100, 100);
    let close = |handles: &mut Handles| handles.closing(0x1000).map(|closing| closing.last);
    assert!(handles.opened(0x1000, import, 5));
    assert!(
        !handles.opened(0x1000, import, 5),
        "two threads at once: charged once"
    );
    assert_eq!(close(&mut handles), Some(None));
    let refused = handles.closing(0x1000).expect("open once more");
    assert_eq!(refused.last, Some(import));
    handles.not_closed(0x1000, &refused);
    assert_eq!(close(&mut handles), Some(Some(import)));
    assert_eq!(close(&mut handles), None);
    assert!(handles.opened(0x1000, (0, 100, 0), 5));
    assert_eq!(
        handles.take_context(5),
        (vec![], vec![(0x1000, (0, 100, 0))])
    );
}

#[test]
fn arrays_go_with_their_context() {
    let array = |device, bytes| Other {
        charge: (device, bytes),
        kind: Kind::Held,
    };
    let mut handles = Handles::default();
    handles.add_other(1, array(0, 10), 5);
    handles.add_other(2, array(1, 20), 6);
    assert_eq!(handles.take_context(5), (vec![array(0, 10)], vec![]));
    assert_eq!(handles.take_other(2), Some((array(1, 20), 6)));
}

#[test]
fn a_handle_that_comes_again_while_the_old_one_is_released_is_another_memory() {
    let mut handles = Handles::default();
    handles.created(7, (0, 100));
    let first = handles.releasing(7).expect("it is on record");
    // The driver is done; another thread gets the same handle before we have gone on.
    handles.created(7, (0, 50));
    assert_eq!(handles.release_ended(&first, true), plain(0, 100));
    assert_eq!(handles.released(7), plain(0, 50));
}

#[test]
fn a_release_that_the_driver_refuses_changes_nothing() {
    let mut handles = Handles::default();
    handles.created(7, (0, 100));
    let refused = handles.releasing(7).expect("it is on record");
    assert_eq!(handles.release_ended(&refused, false), vec![]);
    assert_eq!(handles.released(7), plain(0, 100));
}

#[test]
fn a_descriptor_ends_when_its_number_is_another_ones() {
    // As the driver's: all of one file.
    let descriptor = Descriptor {
        number: 3,
        file: (1, 2),
    };
    let mut handles = Handles::default();
    handles.created(7, (0, 100));
    handles.exported(7, Some(descriptor));
    assert_eq!(handles.released(7), vec![], "its descriptor is open");
    handles.created(8, (0, 50));
    let ended = handles.number_reused(3);
    assert_eq!(ended[0].charge, (0, 100));
    handles.exported(8, Some(descriptor));
    assert_eq!(handles.released(8), vec![]);
}

#[test]
fn an_import_whose_mapping_was_refused_is_sized_by_the_next() {
    let mut handles = Handles::default();
    handles.imported(7, 1, None);
    assert!(handles.sized(7, 2, 0));
    assert!(!handles.sized(7, 2, 0), "another thread was faster");
    assert!(handles.not_sized(7));
    assert_eq!(handles.unsized_import(7), Some(1));
    assert!(handles.sized(7, 100, 0));
    handles.mapped(0x1000, 7);
    assert!(!handles.not_sized(7), "it is mapped");
}
