//! Reads from PTX text what the driver needs: the entry points, their parameters and their variables.
//!
//! No instruction is looked at: an entry runs only if its name is that of a built-in kernel, or if
//! it does nothing.

use crate::code::{INVALID_IMAGE, INVALID_PTX, NO_BINARY_FOR_GPU, R, UNSUPPORTED_PTX_VERSION};

/// Offset and size of one parameter in the parameter buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Param {
    pub offset: usize,
    pub size: usize,
}

/// One `.entry`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub name: String,
    pub params: Vec<Param>,
    /// It returns and does nothing else.
    pub idle: bool,
    /// Bytes of its variables in shared memory, those of a size given at launch not counted.
    pub shared_bytes: usize,
    /// Bytes of the constants that it uses.
    pub const_bytes: usize,
    /// Bytes of its variables in local memory, for each thread.
    pub local_bytes: usize,
    /// It calls `malloc` or `free`.
    pub heap: bool,
}

impl Entry {
    /// Bytes of all parameters.
    #[must_use]
    pub fn params_bytes(&self) -> usize {
        self.params.last().map_or(0, |p| p.offset + p.size)
    }
}

/// What the first bytes of a module image say it is.
///
/// # Errors
/// `NO_BINARY_FOR_GPU` for machine code, which a simulated GPU has none of; `INVALID_IMAGE` for
/// anything that is neither that nor PTX.
pub fn check_magic(first: [u8; 4]) -> R {
    const ELF: [u8; 4] = *b"\x7fELF";
    const FAT_BINARY: u32 = 0xba55_ed50;
    const FAT_WRAPPER: u32 = 0x4662_43b1;
    let word = u32::from_le_bytes(first);
    if first == ELF || word == FAT_BINARY || word == FAT_WRAPPER {
        return Err(NO_BINARY_FOR_GPU);
    }
    if first[0] == b'.' || first[0] == b'/' || first[0].is_ascii_whitespace() {
        Ok(())
    } else {
        Err(INVALID_IMAGE)
    }
}

fn without_comments(text: &str) -> String {
    let mut rest = text;
    let mut clean = String::with_capacity(text.len());
    while let Some(at) = rest.find('/') {
        clean.push_str(&rest[..at]);
        rest = &rest[at..];
        if let Some(line) = rest.strip_prefix("//") {
            rest = line.find('\n').map_or("", |end| &line[end..]);
        } else if let Some(block) = rest.strip_prefix("/*") {
            clean.push(' ');
            rest = block.find("*/").map_or("", |end| &block[end + 2..]);
        } else {
            clean.push('/');
            rest = &rest[1..];
        }
    }
    clean.push_str(rest);
    clean
}

fn unit_bytes(kind: &str) -> Option<usize> {
    Some(match kind {
        ".u8" | ".s8" | ".b8" => 1,
        ".u16" | ".s16" | ".b16" | ".f16" => 2,
        ".u32" | ".s32" | ".b32" | ".f32" | ".f16x2" => 4,
        ".u64" | ".s64" | ".b64" | ".f64" => 8,
        _ => return None,
    })
}

/// Statements, without what they end in and without the labels before them.
fn statements(text: &str) -> impl Iterator<Item = &str> {
    text.split([';', '{', '}']).map(|statement| {
        let after = statement.rfind(':').map_or(0, |label| label + 1);
        statement[after..].trim()
    })
}

/// A variable as a statement declares it: where, its name, alignment and bytes.
fn variable(statement: &str) -> Option<(&str, &str, usize, usize)> {
    let statement = statement.split('=').next()?;
    let mut words = statement.split_whitespace().peekable();
    // Instructions name a state space too, but within a word: `ld.shared.u32`.
    let space = words.find(|word| matches!(*word, ".shared" | ".const" | ".local"))?;
    let mut align = None;
    if words.next_if_eq(&".align").is_some() {
        align = Some(words.next()?.parse().ok()?);
    }
    let unit = unit_bytes(words.next()?)?;
    let rest = statement[statement.find(words.next()?)?..].trim();
    let name = rest.split('[').next()?.trim();
    let mut bytes = unit;
    for count in rest.split('[').skip(1) {
        bytes = bytes.checked_mul(count.split(']').next()?.trim().parse().ok()?)?;
    }
    Some((space, name, align.unwrap_or(unit).max(1), bytes))
}

/// Bytes that the variables of `space` take which an entry declares or speaks of.
fn variables_bytes(module: &str, body: &str, space: &str) -> usize {
    let declared = statements(module)
        .filter_map(variable)
        .filter(|(of, name, ..)| *of == space && body.contains(name));
    declared.fold(0_usize, |end, (_, _, align, bytes)| {
        end.next_multiple_of(align).saturating_add(bytes)
    })
}

fn idle(body: &str) -> bool {
    statements(body).all(|statement| {
        let word = statement.split_whitespace().next().unwrap_or("");
        matches!(word, "" | "ret" | "exit" | ".reg" | ".loc" | ".pragma")
    })
}

/// Whether the text has a call of `malloc` or `free`.
fn calls_heap(body: &str) -> bool {
    statements(body).any(|statement| {
        let mut words = statement
            .split(|c: char| !(c.is_ascii_alphanumeric() || "_.".contains(c)))
            .filter(|word| !word.is_empty());
        words.any(|word| word == "call" || word.starts_with("call."))
            && words.any(|word| word == "malloc" || word == "free")
    })
}

/// The block that a text begins with, braces included.
fn block(text: &str) -> Option<&str> {
    let mut depth = 0_usize;
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'{' => depth += 1,
            b'}' if depth == 1 => return Some(&text[..=at]),
            b'}' => depth = depth.checked_sub(1)?,
            _ => {}
        }
    }
    None
}

fn parse_param(text: &str, end: usize) -> Option<Param> {
    let mut align = None;
    let mut unit = None;
    let mut count = 1;
    let spaced = text.replace('[', " [ ").replace(']', " ] ");
    let mut words = spaced.split_whitespace().peekable();
    if words.next()? != ".param" {
        return None;
    }
    while let Some(word) = words.next() {
        match word {
            ".align" => align = Some(words.next()?.parse::<usize>().ok()?),
            "[" => count = words.next()?.parse().ok()?,
            ".ptr" | ".global" | ".const" | ".shared" | ".local" | "]" => {}
            _ if unit.is_none() => {
                unit = Some(unit_bytes(word)?);
            }
            _ => {}
        }
    }
    let unit: usize = unit?;
    // For pointers, `.align` speaks of what they point at.
    let align = if text.contains(".ptr") {
        unit
    } else {
        align.unwrap_or(unit)
    };
    Some(Param {
        offset: end.checked_next_multiple_of(align.max(1))?,
        size: unit.checked_mul(count)?,
    })
}

/// The entries of a PTX module, for a driver that reads PTX up to version `newest`.
///
/// # Errors
/// `INVALID_PTX` for text that is not PTX, `UNSUPPORTED_PTX_VERSION` if it is too new.
pub fn parse(text: &str, newest: (u32, u32)) -> R<Vec<Entry>> {
    let text = without_comments(text);
    let version = text
        .trim_start()
        .strip_prefix(".version")
        .ok_or(INVALID_PTX)?;
    let version = version
        .split_whitespace()
        .next()
        .and_then(|v| v.split_once('.'))
        .ok_or(INVALID_PTX)?;
    let version: (u32, u32) = (
        version.0.parse().map_err(|_| INVALID_PTX)?,
        version.1.parse().map_err(|_| INVALID_PTX)?,
    );
    if version > newest {
        return Err(UNSUPPORTED_PTX_VERSION);
    }
    if !text.contains(".target") {
        return Err(INVALID_PTX);
    }
    let mut entries = Vec::new();
    let mut rest = text.as_str();
    while let Some(at) = rest.find(".entry") {
        rest = rest[at + ".entry".len()..].trim_start();
        let end = rest
            .find(|c: char| !(c.is_ascii_alphanumeric() || "_$%".contains(c)))
            .ok_or(INVALID_PTX)?;
        let name = rest[..end].to_owned();
        rest = rest[end..].trim_start();
        let mut params = Vec::new();
        if let Some(list) = rest.strip_prefix('(') {
            let close = list.find(')').ok_or(INVALID_PTX)?;
            let mut offset = 0;
            for text in list[..close]
                .split(',')
                .map(str::trim)
                .filter(|t| !t.is_empty())
            {
                let param = parse_param(text, offset).ok_or(INVALID_PTX)?;
                offset = param.offset + param.size;
                params.push(param);
            }
            rest = &list[close + 1..];
        }
        let body = rest.find('{').and_then(|open| block(&rest[open..]));
        let body = body.filter(|_| !name.is_empty()).ok_or(INVALID_PTX)?;
        let bytes = |space| variables_bytes(&text, body, space);
        entries.push(Entry {
            idle: idle(body),
            shared_bytes: bytes(".shared"),
            const_bytes: bytes(".const"),
            local_bytes: bytes(".local"),
            heap: calls_heap(body),
            name,
            params,
        });
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEWEST: (u32, u32) = (8, 7);

    #[test]
    fn entries_and_parameter_layout() {
        let text = "// a comment with .entry\n.version 7.0\n.target sm_70\n.address_size 64\n\
            /* .entry hidden */ .visible .entry one(.param .u32 a, .param .u64 .ptr .global .align 16 p,\n\
            .param .align 8 .b8 blob[12], .param .f32 x)\n{ ret; }\n.entry two { ret; }";
        let entries = parse(text, NEWEST).unwrap();
        assert_eq!(entries.len(), 2);
        assert_eq!(entries[0].name, "one");
        let layout: Vec<_> = entries[0]
            .params
            .iter()
            .map(|p| (p.offset, p.size))
            .collect();
        assert_eq!(layout, [(0, 4), (8, 8), (16, 12), (28, 4)]);
        assert_eq!(entries[0].params_bytes(), 32);
        assert_eq!(entries[1].params, []);
    }

    #[test]
    fn variables_of_an_entry_and_entries_that_do_nothing() {
        let text = ".version 7.0\n.target sm_70\n.const .align 8 .b8 table[80] = {0, 1};\n\
            .visible .shared .align 4 .b8 tile[400];\n.shared .f64 grid[2][3];\n\
            .extern .shared .align 16 .b8 dynamic[];\n.shared .u8 flag;\n\
            .entry busy(.param .u64 p)\n{\n.local .align 16 .b8 __local_depot0[4000];\n.reg .b64 %rd<2>;\n\
            $L_1:\n@%p1 call.uni (retval0), malloc, (param0);\nld.const.u8 %rd1, [table];\nst.shared.u8 [flag], %rd1;\nst.shared.u8 [grid], %rd1;\n\
            st.shared.u8 [dynamic], %rd1; {ret;} }\n\
            .entry none() {\n.reg .b32 %r<2>;\n.loc 1 2 3\nret;\n}";
        let entries = parse(text, NEWEST).unwrap();
        let sizes = |e: &Entry| (e.idle, e.shared_bytes, e.const_bytes, e.local_bytes);
        assert_eq!(sizes(&entries[0]), (false, 49, 80, 4000));
        assert_eq!(sizes(&entries[1]), (true, 0, 0, 0));
        assert!(entries[0].heap && !entries[1].heap);
        let open = ".version 7.0\n.target sm_70\n.entry none() { ret;";
        assert_eq!(parse(open, NEWEST), Err(INVALID_PTX));
    }

    #[test]
    fn the_shipped_kernels_are_read() {
        let entries = parse(include_str!("../../kernels/spillway.ptx"), NEWEST).unwrap();
        for entry in &entries {
            assert!(
                crate::kernels::Builtin::find(&entry.name, entry.params_bytes()).is_some(),
                "{}",
                entry.name
            );
        }
        assert_eq!(entries.len(), 6);
    }

    #[test]
    fn the_kernels_that_take_memory_are_read() {
        let heap = parse(include_str!("../../kernels/heap.ptx"), NEWEST).unwrap();
        let stack = parse(include_str!("../../kernels/stack.ptx"), NEWEST).unwrap();
        assert!(heap[0].heap && !stack[0].heap);
        assert_eq!((heap[0].local_bytes, stack[0].local_bytes), (0, 4096));
        for entry in [&heap[0], &stack[0]] {
            assert!(crate::kernels::Builtin::find(&entry.name, entry.params_bytes()).is_some());
        }
    }

    #[test]
    fn what_is_not_ptx() {
        assert_eq!(parse("hello", NEWEST), Err(INVALID_PTX));
        assert_eq!(
            parse(
                ".version 7.0\n.target sm_70\n.entry x(.param .q9 a) {}",
                NEWEST
            ),
            Err(INVALID_PTX)
        );
        assert_eq!(
            parse(".version 8.8\n.target sm_70\n", NEWEST),
            Err(UNSUPPORTED_PTX_VERSION)
        );
        assert_eq!(check_magic(*b"\x7fELF"), Err(NO_BINARY_FOR_GPU));
        assert_eq!(
            check_magic([0x50, 0xed, 0x55, 0xba]),
            Err(NO_BINARY_FOR_GPU)
        );
        assert_eq!(check_magic(*b"abcd"), Err(INVALID_IMAGE));
        assert_eq!(check_magic(*b"\n.ve"), Ok(()));
    }
}
