//! Which GPUs of the machine a process sees, and in which order: `CUDA_VISIBLE_DEVICES`.
//!
//! Source: CUDA programming guide, environment variables; PyTorch, which repeats the driver's rules
//! (`torch.cuda._parse_visible_devices`): the list ends before the first entry that names no GPU,
//! and a GPU named twice leaves none.

const UUID: &str = "GPU-";

/// The number at the start of an entry.
fn number(entry: &str) -> Option<u32> {
    let digits = entry
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(entry.len());
    entry[..digits].parse().ok()
}

/// The one GPU whose UUID begins so.
fn by_uuid(entry: &str, uuids: &[String]) -> Option<u32> {
    let begins = |uuid: &&String| {
        uuid.get(..entry.len())
            .is_some_and(|head| head.eq_ignore_ascii_case(entry))
    };
    let mut found = (0..).zip(uuids).filter(|(_, uuid)| begins(uuid));
    match (found.next(), found.next()) {
        (Some((gpu, _)), None) if entry.len() > UUID.len() => Some(gpu),
        _ => None,
    }
}

/// The GPUs that `list` selects of those with these UUIDs; all without a list.
#[must_use]
pub fn select(list: Option<&str>, uuids: &[String]) -> Vec<u32> {
    let gpus = uuids.len() as u32;
    let Some(list) = list else {
        return (0..gpus).collect();
    };
    let uuid = list.trim_start().starts_with(UUID);
    let mut selected = Vec::new();
    for entry in list.split(',').map(str::trim) {
        let gpu = if uuid {
            by_uuid(entry, uuids)
        } else {
            number(entry).filter(|gpu| *gpu < gpus)
        };
        match gpu {
            None => break,
            Some(gpu) if selected.contains(&gpu) => return Vec::new(),
            Some(gpu) => selected.push(gpu),
        }
    }
    selected
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(list: &str) -> Vec<u32> {
        let uuids = ["GPU-ab00-1", "GPU-ab11-2", "GPU-cd22-3"].map(str::to_owned);
        select(Some(list), &uuids)
    }

    #[test]
    fn order_and_subset() {
        assert_eq!(of("2,0"), [2, 0]);
        assert_eq!(of(" 1 "), [1]);
        assert_eq!(select(None, &["GPU-1".to_owned()]), [0]);
    }

    #[test]
    fn the_list_ends_where_it_names_none() {
        assert_eq!(of("0,3,1"), [0]);
        assert_eq!(of("1,-1,0"), [1]);
        assert_eq!(of(""), []);
        assert_eq!(of("-1"), []);
        assert_eq!(of("0,GPU-cd"), [0]);
    }

    #[test]
    fn one_named_twice_leaves_none() {
        assert_eq!(of("0,1,0"), []);
        assert_eq!(of("GPU-cd,GPU-cd22"), []);
    }

    #[test]
    fn uuids_may_be_cut_short_if_they_stay_unique() {
        assert_eq!(of("GPU-cd22-3,GPU-ab0"), [2, 0]);
        assert_eq!(of("GPU-ab"), []);
        assert_eq!(of("GPU-"), []);
        assert_eq!(of("GPU-CD"), [2]);
        assert_eq!(of("GPU-cd,1"), [2]);
    }
}
