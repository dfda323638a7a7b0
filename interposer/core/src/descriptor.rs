//! A descriptor of ours in somebody else's process.
//!
//! The program may close any number and be given it again for a file of its own: daemons close all
//! above 2, and some are started without 0 to 2. So ours lie high, where a program's own numbers do
//! not get, and each remembers which file it is. Before a number is used or closed the kernel is asked
//! whether it still means that file. A thread of the program that closes it between the question and
//! the use cannot be guarded against.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd};

/// Where to look for a free number: the first of these that the process's limit allows.
const FLOORS: [RawFd; 3] = [512, 64, 3];

/// See the module.
#[derive(Debug)]
pub struct Descriptor {
    number: RawFd,
    /// Device and inode of the file.
    file: (u64, u64),
}

fn status(number: RawFd) -> io::Result<libc::stat> {
    // SAFETY: an all-zero stat is a valid value for the kernel to fill.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the buffer is a stat; any number may be asked about.
    if unsafe { libc::fstat(number, &raw mut stat) } == 0 {
        Ok(stat)
    } else {
        Err(io::Error::last_os_error())
    }
}

impl Descriptor {
    /// Takes a descriptor over, out of the program's way.
    ///
    /// # Errors
    /// The process has no number left above 2.
    pub fn keep(fd: OwnedFd) -> io::Result<Self> {
        let mut number = -1;
        for floor in FLOORS {
            // SAFETY: makes a new number for an open descriptor; touches no memory.
            number = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, floor) };
            if number >= 0 {
                break;
            }
        }
        if number < 0 {
            let why = io::Error::last_os_error();
            if fd.as_raw_fd() <= 2 {
                return Err(why);
            }
            number = fd.into_raw_fd();
        }
        let stat = status(number)?;
        Ok(Self {
            number,
            file: (stat.st_dev, stat.st_ino),
        })
    }

    fn look(&self) -> io::Result<libc::stat> {
        let stat = status(self.number)?;
        if (stat.st_dev, stat.st_ino) == self.file {
            Ok(stat)
        } else {
            Err(io::Error::from_raw_os_error(libc::EBADF))
        }
    }

    /// The descriptor, for use now.
    ///
    /// # Errors
    /// The program has closed it.
    pub fn get(&self) -> io::Result<BorrowedFd<'_>> {
        self.look()?;
        // SAFETY: open, and ours by the check above; see the module for what remains.
        Ok(unsafe { BorrowedFd::borrow_raw(self.number) })
    }

    /// Bytes of memory behind the file, for a file in memory: fewer than its size once somebody has
    /// punched holes into it.
    ///
    /// # Errors
    /// The program has closed it.
    pub fn held_bytes(&self) -> io::Result<u64> {
        /// The unit of `st_blocks`, whatever the file system.
        const BLOCK: u64 = 512;
        Ok(u64::try_from(self.look()?.st_blocks).unwrap_or(0) * BLOCK)
    }

    /// Closes a forked child's copy. Takes no lock and allocates nothing.
    pub fn close_in_child(&self) {
        if self.look().is_ok() {
            // SAFETY: ours by the check; nothing in the child uses it.
            unsafe { libc::close(self.number) };
        }
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        if self.look().is_ok() {
            // SAFETY: ours by the check, and not used after this.
            unsafe { libc::close(self.number) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;

    #[test]
    fn lies_out_of_the_way_and_closes_itself() {
        let file: OwnedFd = File::open("/proc/self/stat").expect("opens").into();
        let kept = Descriptor::keep(file).expect("kept");
        let number = kept.get().expect("open").as_raw_fd();
        assert!(number >= 64, "{number}");
        // SAFETY: asks about a number.
        let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
        assert_eq!(flags, libc::FD_CLOEXEC);
        drop(kept);
        assert!(status(number).is_err());
    }

    #[test]
    fn a_number_that_means_another_file_is_not_touched() {
        let kept = Descriptor::keep(File::open("/proc/self/stat").expect("opens").into());
        let kept = kept.expect("kept");
        let number = kept.get().expect("open").as_raw_fd();
        let other = File::open("/proc/self/maps").expect("opens");
        // The program takes the number for itself.
        // SAFETY: replaces what the number means, as a program may.
        let taken = unsafe { libc::dup2(other.as_fd().as_raw_fd(), number) };
        assert_eq!(taken, number);
        assert!(kept.get().is_err());
        kept.close_in_child();
        drop(kept);
        assert!(status(number).is_ok(), "the program's file was closed");
        // SAFETY: the number made above.
        unsafe { libc::close(number) };
    }
}
