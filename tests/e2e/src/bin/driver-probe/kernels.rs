//! Code: modules, and kernels of the project's own.

use std::ffi::{CStr, c_char, c_void};
use std::sync::{Arc, Barrier};

use super::Probe;

/// The project's kernels.
const KERNELS: &str = concat!(
    include_str!("../../../../../simulator/kernels/spillway.ptx"),
    "\0"
);

impl Probe {
    pub fn modules(&self, threads: usize) -> String {
        let start = Arc::new(Barrier::new(threads));
        let context = self.contexts[self.device];
        let runners: Vec<_> = (0..threads)
            .map(|_| {
                let (cuda, start) = (self.cuda.clone(), start.clone());
                std::thread::spawn(move || {
                    cuda.current(context);
                    start.wait();
                    let mut module = 0usize;
                    let code = call!(cuda.0, "cuModuleLoadData", &raw mut module => *mut usize,
                        KERNELS.as_ptr() => *const u8);
                    if code == 0 {
                        let _ = call!(cuda.0, "cuModuleUnload", module => usize);
                    }
                    code
                })
            })
            .collect();
        let codes: Vec<i32> = runners
            .into_iter()
            .map(|runner| runner.join().expect("a thread"))
            .collect();
        let count = |which: fn(i32) -> bool| codes.iter().filter(|code| which(**code)).count();
        let (won, refused) = (count(|code| code == 0), count(|code| code == 2));
        format!(
            "won {won} refused {refused} other {}",
            threads - won - refused
        )
    }

    fn kernel(&mut self, name: &CStr) -> Result<usize, i32> {
        let fine = |code: i32| if code == 0 { Ok(()) } else { Err(code) };
        if self.module == 0 {
            let module = &raw mut self.module;
            fine(
                call!(self.cuda.0, "cuModuleLoadData", module => *mut usize, KERNELS.as_ptr() => *const u8),
            )?;
        }
        let mut at = 0usize;
        let found = call!(self.cuda.0, "cuModuleGetFunction", &raw mut at => *mut usize,
            self.module => usize, name.as_ptr() => *const c_char);
        fine(found).map(|()| at)
    }

    /// Threads that keep three kernels of some milliseconds ahead on a stream each, until the end.
    pub fn busy(&mut self, streams: usize) -> Result<(), i32> {
        let spin = self.kernel(c"spin_ns")?;
        let context = self.contexts[self.device];
        for _ in 0..streams {
            let cuda = self.cuda.clone();
            std::thread::spawn(move || {
                cuda.current(context);
                let (mut stream, mut events) = (0usize, [0usize; 3]);
                let mut made =
                    call!(cuda.0, "cuStreamCreate", &raw mut stream => *mut usize, 1 => u32);
                for event in &mut events {
                    made |= call!(cuda.0, "cuEventCreate", &raw mut *event => *mut usize, 2 => u32);
                }
                assert_eq!(made, 0);
                let time = 5_000_000u64;
                let values: [*const c_void; 1] = [(&raw const time).cast()];
                for event in events.into_iter().cycle() {
                    let _ = call!(cuda.0, "cuEventSynchronize", event => usize);
                    let launched = call!(cuda.0, "cuLaunchKernel", spin => usize,
                        1 => u32, 1 => u32, 1 => u32, 1 => u32, 1 => u32, 1 => u32, 0 => u32, stream => usize,
                        values.as_ptr() => *const *const c_void, std::ptr::null() => *const c_void);
                    let recorded = call!(cuda.0, "cuEventRecord", event => usize, stream => usize);
                    assert_eq!((launched, recorded), (0, 0));
                }
            });
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
        Ok(())
    }

    /// Launches a kernel that takes `ms`, and behind it kernels that write to all that is allocated.
    pub fn late(&mut self, ms: u64, word: u32) -> Result<(), i32> {
        let fine = |code: i32| if code == 0 { Ok(()) } else { Err(code) };
        let (spin, fill) = (self.kernel(c"spin_ns")?, self.kernel(c"fill_u32")?);
        let launch = |kernel: usize, blocks: u32, values: &[*const c_void]| {
            fine(
                call!(self.cuda.0, "cuLaunchKernel", kernel => usize, blocks => u32, 1 => u32, 1 => u32,
                256 => u32, 1 => u32, 1 => u32, 0 => u32, 0 => usize,
                values.as_ptr() => *const *const c_void, std::ptr::null() => *const c_void),
            )
        };
        let time = ms * 1_000_000;
        launch(spin, 1, &[(&raw const time).cast()])?;
        for &(at, bytes, _) in &self.held {
            let word = word.wrapping_add(u32::try_from(at >> 9 & 0xffff_ffff).unwrap_or(0));
            let words = bytes as u64 / 4;
            launch(
                fill,
                64,
                &[
                    (&raw const at).cast(),
                    (&raw const words).cast(),
                    (&raw const word).cast(),
                ],
            )?;
        }
        Ok(())
    }

    /// Loads the kernel with local memory, and asks for it.
    pub fn find_stack(&self) -> Result<(), i32> {
        const PTX: &str = concat!(
            include_str!("../../../../../simulator/kernels/stack.ptx"),
            "\0"
        );
        let fine = |code: i32| if code == 0 { Ok(()) } else { Err(code) };
        let (mut module, mut function) = (0usize, 0usize);
        fine(
            call!(self.cuda.0, "cuModuleLoadData", &raw mut module => *mut usize, PTX.as_ptr() => *const u8),
        )?;
        fine(
            call!(self.cuda.0, "cuModuleGetFunction", &raw mut function => *mut usize, module => usize,
            c"stack_u32".as_ptr() => *const c_char),
        )
    }
}
