//! A disk of a given rate, for what reading a model from one takes: the file itself may be in memory.

use std::time::{Duration, Instant};

/// Reads ahead at its rate from when it was made, whatever is done with the bytes meanwhile.
#[derive(Clone, Copy, Debug)]
pub struct Disk {
    bytes_per_second: f64,
    began: Instant,
    read: f64,
}

impl Disk {
    /// Starts to read.
    #[must_use]
    pub fn new(bytes_per_second: u64) -> Self {
        Self {
            #[expect(clippy::cast_precision_loss, reason = "a rate")]
            bytes_per_second: bytes_per_second.max(1) as f64,
            began: Instant::now(),
            read: 0.0,
        }
    }

    /// Waits until so many more bytes have come from the disk.
    pub fn wait_for(&mut self, bytes: usize) {
        #[expect(clippy::cast_precision_loss, reason = "a time")]
        let bytes = bytes as f64;
        self.read += bytes;
        let due = self.began + Duration::from_secs_f64(self.read / self.bytes_per_second);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
}

#[cfg(test)]
mod tests {
    use super::Disk;
    use std::time::{Duration, Instant};

    #[test]
    fn a_disk_is_no_faster_than_its_rate_and_goes_on_meanwhile() {
        let began = Instant::now();
        let mut disk = Disk::new(10 << 20);
        disk.wait_for(512 << 10);
        assert!(began.elapsed() >= Duration::from_millis(49));
        // What was read ahead in this time is there at once.
        std::thread::sleep(Duration::from_millis(60));
        let asked = Instant::now();
        disk.wait_for(512 << 10);
        assert!(asked.elapsed() < Duration::from_millis(30));
    }
}
