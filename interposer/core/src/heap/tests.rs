use super::*;

const MIB: u64 = 1 << 20;

fn block(base: u64, bytes: u64, context: usize) -> Block {
    let chunk = Chunk {
        offset: 0,
        bytes,
        handle: base + 1,
        host: Vec::new(),
    };
    Block::new(base, 0, context, true, vec![chunk])
}

#[test]
fn a_large_allocation_is_its_block() {
    let mut heap = Heap::default();
    heap.add_own(block(1 << 30, 4 * MIB, 1), 3 * MIB, 0);
    let alloc = heap.find(1 << 30).unwrap();
    assert_eq!((alloc.bytes, alloc.place), (3 * MIB, Place::Own));
    assert_eq!(heap.containing((1 << 30) + 3 * MIB - 1), Some(alloc));
    assert_eq!(heap.containing((1 << 30) + 3 * MIB), None);
    assert_eq!(heap.containing((1 << 30) - 1), None);
    let taken = heap.take(1 << 30).unwrap();
    assert_eq!(heap.find(1 << 30), None, "a double free finds nothing");
    assert_eq!(heap.give_back(&taken).unwrap().bytes, 4 * MIB);
    assert_eq!(heap.pageable_bytes(), 0);
}

#[test]
fn small_allocations_share_slabs_of_their_own_context() {
    let mut heap = Heap::default();
    assert_eq!(heap.carve(1, 100, 0), None);
    heap.add_slab(block(1 << 30, 2 * MIB, 1).into_slab());
    let a = heap.carve(1, 100, 0).unwrap();
    let b = heap.carve(1, 100, 0).unwrap();
    assert_ne!(a, b);
    assert_eq!(
        heap.carve(2, 100, 0),
        None,
        "another context's slab is not ours"
    );
    assert_eq!(heap.spare_bytes(0), 0);
    for ptr in [a, b] {
        let taken = heap.take(ptr).unwrap();
        assert!(heap.give_back(&taken).is_none(), "one empty slab is kept");
    }
    assert_eq!(heap.spare_bytes(0), 2 * MIB);
    assert_eq!(heap.take_empty_slabs(0).len(), 1);
    assert_eq!(heap.spare_bytes(0), 0);
}

#[test]
fn the_second_empty_slab_is_released() {
    let mut heap = Heap::default();
    heap.add_slab(block(1 << 30, 2 * MIB, 1).into_slab());
    heap.add_slab(block(2 << 30, 2 * MIB, 1).into_slab());
    let ptrs: Vec<u64> = (0..4)
        .map(|_| heap.carve(1, MIB - 512, 0).unwrap())
        .collect();
    let released: usize = ptrs
        .iter()
        .filter_map(|&ptr| {
            let taken = heap.take(ptr).unwrap();
            heap.give_back(&taken)
        })
        .count();
    assert_eq!(released, 1);
}

#[test]
fn a_free_during_a_move_waits_for_its_end() {
    let mut heap = Heap::default();
    heap.add_own(block(1 << 30, 4 * MIB, 1), 4 * MIB, 0);
    heap.add_own(block(2 << 30, 4 * MIB, 1), 4 * MIB, 0);
    let moved = heap.begin_move();
    assert_eq!(moved.len(), 2);
    let taken = heap.take(1 << 30).unwrap();
    assert!(heap.give_back(&taken).is_none());
    assert!(heap.take_empty_slabs(0).is_empty());
    let dead = heap.end_move(moved);
    assert_eq!(dead.len(), 1);
    assert_eq!(
        dead[0].chunks[0].handle,
        (1 << 30) + 1,
        "with its chunks, to be released"
    );
    assert_eq!(heap.pageable_bytes(), 4 * MIB);
}

#[test]
fn pinned_blocks_do_not_move() {
    let mut heap = Heap::default();
    let mut pinned = block(1 << 30, 4 * MIB, 1);
    pinned.pageable = false;
    heap.add_own(pinned, 4 * MIB, 0);
    assert!(heap.begin_move().is_empty());
}

#[test]
fn a_context_takes_all_its_memory_along() {
    let mut heap = Heap::default();
    heap.add_own(block(1 << 30, 4 * MIB, 1), 4 * MIB, 0);
    heap.add_slab(block(2 << 30, 2 * MIB, 1).into_slab());
    heap.carve(1, 5, 9).unwrap();
    heap.add_driver((77, 5), 0, 1, 0, Place::Driver);
    heap.add_driver((78, 5), 0, 1, 9, Place::Pool);
    heap.add_own(block(3 << 30, 4 * MIB, 2), 4 * MIB, 0);
    let (blocks, allocs) = heap.take_context(1);
    assert_eq!((blocks.len(), allocs.len()), (2, 3));
    assert!(heap.find(3 << 30).is_some());
    assert_eq!(heap.carve(1, 5, 9), None);
}

/// Against a record of its own: nothing overlaps, everything is found, and what is given back is counted.
#[test]
fn seeded_allocations_are_found_by_every_pointer_into_them() {
    let (mut heap, mut live, mut seed) = (Heap::default(), Vec::<(u64, u64, u64)>::new(), 5_u64);
    let mut next = 1_u64 << 30;
    for step in 0..20_000 {
        seed = seed
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        let context = 1 + (seed >> 20) as usize % 2;
        if seed >> 63 == 0 || live.is_empty() {
            let most = if step % 50 == 0 { SMALL - 1 } else { 20_000 };
            let (bytes, pool) = (1 + (seed >> 33) % most, seed >> 25 & 1);
            let ptr = heap.carve(context, bytes, pool).unwrap_or_else(|| {
                heap.add_slab(block(next, 2 * MIB, context).into_slab());
                next += 2 * MIB;
                heap.carve(context, bytes, pool).expect("a fresh slab")
            });
            live.push((ptr, bytes, pool));
        } else {
            let (ptr, bytes, pool) = live.swap_remove((seed >> 33) as usize % live.len());
            let alloc = heap.containing(ptr + bytes - 1).expect("it is alive");
            assert_eq!((alloc.ptr, alloc.bytes, alloc.pool), (ptr, bytes, pool));
            assert_eq!(
                heap.containing(ptr + small_size(bytes) - 1).is_some(),
                bytes % 512 == 0
            );
            assert_eq!(heap.find(ptr), Some(alloc));
            assert_eq!(heap.take(ptr), Some(alloc));
            assert_eq!((heap.find(ptr), heap.take(ptr)), (None, None));
            heap.give_back(&alloc);
        }
    }
    let mut ranges: Vec<_> = live
        .iter()
        .map(|&(ptr, bytes, _)| (ptr, ptr + bytes))
        .collect();
    ranges.sort_unstable();
    assert!(
        ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0),
        "none overlap"
    );
    for (ptr, ..) in live {
        let alloc = heap.take(ptr).expect("it is alive");
        heap.give_back(&alloc);
    }
    // One empty slab of each context.
    assert_eq!(heap.spare_bytes(0), 4 * MIB);
    assert_eq!(heap.take_empty_slabs(0).len(), 2);
    assert_eq!(
        (heap.spare_bytes(0), heap.take_empty_slabs(0).len()),
        (0, 0)
    );
}

#[test]
fn what_a_pool_leaves_behind_is_of_no_pool() {
    let mut heap = Heap::default();
    heap.add_slab(block(1 << 30, 2 * MIB, 1).into_slab());
    let (of_it, of_other) = (heap.carve(1, 5, 9).unwrap(), heap.carve(1, 5, 8).unwrap());
    heap.add_driver((77, 5), 0, 1, 9, Place::Pool);
    assert_eq!(heap.pool_gone(9).len(), 1);
    let pool = |ptr| heap.find(ptr).map(|alloc| alloc.pool);
    assert_eq!(
        (pool(of_it), pool(of_other), pool(77)),
        (Some(0), Some(8), Some(0))
    );
}

#[test]
fn a_refused_free_puts_all_back_and_a_revival_is_a_new_allocation() {
    let mut heap = Heap::default();
    heap.add_slab(block(1 << 30, 2 * MIB, 1).into_slab());
    let ptr = heap.carve(1, 700, 3).unwrap();
    let alloc = heap.take(ptr).unwrap();
    heap.put_back(alloc);
    assert_eq!(heap.find(ptr), Some(alloc));
    let alloc = heap.take(ptr).unwrap();
    assert_eq!(heap.revive(alloc, 701), ptr);
    let revived = heap.find(ptr).unwrap();
    assert_eq!((revived.bytes, revived.pool), (701, 3));
    assert_ne!(revived.id, alloc.id);
}
