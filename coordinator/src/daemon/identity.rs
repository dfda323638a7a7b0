//! Who is at the other end of a session socket: told by the kernel, never by the process.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt};

/// `SO_PEERPIDFD` (Linux 6.5), which libc does not name everywhere.
const SO_PEERPIDFD: libc::c_int = 77;

/// Text in a control group's path that shows a container.
const CONTAINER_MARKS: [&str; 8] = [
    "docker",
    "containerd",
    "kubepods",
    "libpod",
    "crio",
    "cri-",
    "lxc",
    "nerdctl",
];

/// A process.
#[derive(Debug)]
pub struct Identity {
    /// As seen from here.
    pub pid: i32,
    /// Its user.
    pub uid: u32,
    /// Readable once the process has ended. `None`: the kernel has no such thing; then only the end
    /// of the socket tells.
    pub pidfd: Option<OwnedFd>,
    /// `/proc/PID/cgroup`, whole: with version 1 a container may differ in any hierarchy.
    pub cgroup: String,
    /// Runs in a container.
    pub container: Option<String>,
    /// `/proc/PID/comm`.
    pub command: String,
}

impl Identity {
    /// Asks the kernel about the peer.
    ///
    /// # Errors
    /// One line: the peer is gone, or the kernel does not say.
    pub fn of_peer(socket: BorrowedFd<'_>) -> Result<Self, String> {
        let credentials = getsockopt(&socket, sockopt::PeerCredentials)
            .map_err(|error| format!("the kernel does not tell who connects: {error}"))?;
        let pid = credentials.pid();
        if pid <= 0 {
            return Err(
                "the process is in a pid namespace that is not below spillwayd's: run spillwayd in the host's"
                    .to_owned(),
            );
        }
        let pidfd = peer_pidfd(socket).or_else(|| open_pidfd(pid));
        let cgroup = read_proc(pid, "cgroup");
        let command = read_proc(pid, "comm").trim().to_owned();
        let container = container_of(&cgroup, pid);
        // The files above belong to the peer only if it still lives now: its number cannot have been
        // given to another before it ended.
        if pidfd.as_ref().is_some_and(has_ended) {
            return Err("the process has ended".to_owned());
        }
        Ok(Self {
            pid,
            uid: credentials.uid(),
            pidfd,
            cgroup,
            container,
            command,
        })
    }
}

pub(super) fn read_proc(pid: i32, file: &str) -> String {
    std::fs::read(format!("/proc/{pid}/{file}"))
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default()
}

fn peer_pidfd(socket: BorrowedFd<'_>) -> Option<OwnedFd> {
    let mut fd: libc::c_int = -1;
    let mut len = libc::socklen_t::try_from(size_of::<libc::c_int>()).ok()?;
    // SAFETY: `fd` and `len` live during the call and have the sizes that are said.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut fd).cast(),
            &raw mut len,
        )
    };
    // SAFETY: the kernel has just made this descriptor for us.
    (result == 0 && fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
}

pub(super) fn open_pidfd(pid: i32) -> Option<OwnedFd> {
    // SAFETY: takes two integers, touches no memory.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn has_ended(pidfd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    matches!(poll(&mut fds, PollTimeout::ZERO), Ok(n) if n > 0)
}

/// Ends a process, exactly this one: by its descriptor, not by its number.
pub fn kill(pidfd: &OwnedFd) -> bool {
    // SAFETY: takes integers and a null pointer, which means no further information.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            libc::SIGKILL,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    result == 0
}

/// A short name for the container that a process is in; `None` outside of containers.
pub(super) fn container_of(cgroup: &str, pid: i32) -> Option<String> {
    if let Some(name) = container_name(cgroup) {
        return Some(name);
    }
    let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let (own, theirs) = (namespace("self")?, namespace(&pid.to_string())?);
    // A pid namespace of its own is a container, too, however it was made.
    (own != theirs).then(|| {
        let digits: String = theirs
            .to_string_lossy()
            .chars()
            .filter(char::is_ascii_digit)
            .collect();
        format!("container-{digits}")
    })
}

fn container_name(cgroup: &str) -> Option<String> {
    let path = cgroup
        .lines()
        .filter_map(|line| line.splitn(3, ':').nth(2))
        .find(|path| CONTAINER_MARKS.iter().any(|mark| path.contains(mark)))?;
    let last = path.rsplit('/').find(|part| !part.is_empty())?;
    // docker-0123...scope, cri-containerd-0123....scope, 0123...
    let stem = last.strip_suffix(".scope").unwrap_or(last);
    let id = stem.rsplit('-').next().unwrap_or(stem);
    let short: String = id
        .chars()
        .filter(char::is_ascii_alphanumeric)
        .take(12)
        .collect();
    (!short.is_empty()).then(|| format!("container-{short}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_are_told_by_their_cgroup() {
        let docker = "0::/system.slice/docker-0123456789abcdef0123.scope\n";
        assert_eq!(
            container_name(docker).as_deref(),
            Some("container-0123456789ab")
        );
        let pod = "12:memory:/kubepods/burstable/pod12/abcdef0123456789\n0::/\n";
        assert_eq!(
            container_name(pod).as_deref(),
            Some("container-abcdef012345")
        );
        assert_eq!(container_name("0::/user.slice/session-1.scope\n"), None);
        assert_eq!(container_name("0::/\n"), None);
    }

    #[test]
    fn the_peer_of_our_own_socket_is_us() {
        let (one, _other) = nix::sys::socket::socketpair(
            nix::sys::socket::AddressFamily::Unix,
            nix::sys::socket::SockType::SeqPacket,
            None,
            nix::sys::socket::SockFlag::SOCK_CLOEXEC,
        )
        .expect("a pair");
        let identity = Identity::of_peer(one.as_fd()).expect("known");
        assert_eq!(u32::try_from(identity.pid), Ok(std::process::id()));
        assert!(!identity.cgroup.is_empty());
    }
}
