//! The run directory: one daemon at a time, sockets with modes that are set and not inherited.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use nix::unistd::{Group, chown, geteuid};
use spillway_protocol::names;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 512;

/// The directory where none was set.
#[must_use]
pub fn default_dir() -> PathBuf {
    if !geteuid().is_root()
        && let Some(dir) = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty())
    {
        return PathBuf::from(dir).join("spillway");
    }
    PathBuf::from(names::RUN_DIR)
}

/// A run directory that this daemon holds, with its sockets.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    /// Held as long as the daemon lives; the kernel lets go of it however the daemon ends.
    _lock: Flock<File>,
}

impl RunDir {
    /// Makes the directory and takes it.
    ///
    /// # Errors
    /// It cannot be made, or another daemon holds it.
    pub fn take(path: &Path) -> Result<Self> {
        for dir in [path.to_path_buf(), path.join("session")] {
            fs::create_dir_all(&dir).with_context(|| {
                format!(
                    "cannot make {}: choose another directory with --run-dir",
                    dir.display()
                )
            })?;
            fs::set_permissions(&dir, Permissions::from_mode(0o755))
                .with_context(|| format!("cannot set the mode of {}", dir.display()))?;
        }
        let file = path.join("spillwayd.lock");
        let mut lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&file)
            .with_context(|| format!("cannot open {}", file.display()))?;
        let mut owner = String::new();
        let _ = lock.read_to_string(&mut owner);
        let mut lock = match Flock::lock(lock, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((_, nix::Error::EWOULDBLOCK)) => bail!(
                "another spillwayd (pid {}) serves {}: end it first, or give this one a --run-dir of its own",
                owner.trim(),
                path.display()
            ),
            Err((_, error)) => bail!("cannot lock {}: {error}", file.display()),
        };
        lock.set_len(0)?;
        std::io::Seek::rewind(&mut *lock)?;
        writeln!(lock, "{}", std::process::id())?;
        Ok(Self {
            path: path.to_path_buf(),
            _lock: lock,
        })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Binds `session/session.sock`, mode 0666.
    ///
    /// # Errors
    /// Something that is not a socket is in its place, or the system refuses.
    pub fn session_listener(&self) -> Result<OwnedFd> {
        let path = names::session_socket(&self.path);
        clear_way(&path)?;
        let socket = socket(
            AddressFamily::Unix,
            SockType::SeqPacket,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            None,
        )?;
        let address = UnixAddr::new(&path)
            .with_context(|| format!("{} is too long for a socket", path.display()))?;
        bind(socket.as_raw_fd(), &address)
            .with_context(|| format!("cannot bind {}", path.display()))?;
        fs::set_permissions(&path, Permissions::from_mode(0o666))?;
        listen(&socket, Backlog::new(BACKLOG)?)?;
        Ok(socket)
    }

    /// Binds `api.sock`, mode 0600, or 0660 for a group.
    ///
    /// # Errors
    /// Something that is not a socket is in its place, there is no such group, or the system refuses.
    pub fn api_listener(&self, group: Option<&str>) -> Result<UnixListener> {
        let path = names::api_socket(&self.path);
        clear_way(&path)?;
        let group = match group {
            None => None,
            Some(name) => Some(
                Group::from_name(name)?
                    .with_context(|| format!("--api-group: there is no group {name:?}"))?,
            ),
        };
        // A socket that nobody can connect to before its mode is right: bound, not yet listening.
        let socket = socket(
            AddressFamily::Unix,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC,
            None,
        )?;
        let address = UnixAddr::new(&path)
            .with_context(|| format!("{} is too long for a socket", path.display()))?;
        bind(socket.as_raw_fd(), &address)
            .with_context(|| format!("cannot bind {}", path.display()))?;
        if let Some(group) = &group {
            chown(&path, None, Some(group.gid))
                .with_context(|| format!("cannot give {} to its group", path.display()))?;
        }
        let mode = if group.is_some() { 0o660 } else { 0o600 };
        fs::set_permissions(&path, Permissions::from_mode(mode))?;
        listen(&socket, Backlog::new(BACKLOG)?)?;
        let raw = std::os::fd::IntoRawFd::into_raw_fd(socket);
        // SAFETY: a listening unix stream socket that we own and hand over.
        Ok(unsafe { UnixListener::from_raw_fd(raw) })
    }

    /// Removes the sockets, so that nobody waits at the door of a daemon that is gone.
    pub fn clear(&self) {
        for path in [
            names::session_socket(&self.path),
            names::api_socket(&self.path),
        ] {
            let _ = fs::remove_file(path);
        }
    }
}

/// Removes a socket that a former daemon left; the lock tells that it is dead.
fn clear_way(path: &Path) -> Result<()> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("cannot look at {}", path.display())),
        Ok(found) if found.file_type().is_socket() => fs::remove_file(path)
            .with_context(|| format!("cannot remove the stale {}", path.display())),
        Ok(_) => bail!(
            "{} is not a socket: remove it, or choose another --run-dir",
            path.display()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_set_whatever_the_umask() {
        let dir = tempfile::tempdir().expect("a directory");
        let before = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
        let run = RunDir::take(&dir.path().join("run")).expect("taken");
        let _session = run.session_listener().expect("bound");
        let _api = run.api_listener(None).expect("bound");
        nix::sys::stat::umask(before);
        let mode =
            |path: PathBuf| fs::metadata(path).expect("is there").permissions().mode() & 0o777;
        assert_eq!(mode(run.path().to_path_buf()), 0o755);
        assert_eq!(mode(run.path().join("session")), 0o755);
        assert_eq!(mode(names::session_socket(run.path())), 0o666);
        assert_eq!(mode(names::api_socket(run.path())), 0o600);
        run.clear();
        assert!(!names::session_socket(run.path()).exists());
    }

    #[test]
    fn one_daemon_at_a_time_and_stale_sockets_are_replaced() {
        let dir = tempfile::tempdir().expect("a directory");
        let run = RunDir::take(dir.path()).expect("taken");
        let listener = run.session_listener().expect("bound");
        let text = format!("{:#}", RunDir::take(dir.path()).expect_err("held"));
        assert!(
            text.contains(&format!("pid {}", std::process::id())),
            "{text}"
        );
        drop((run, listener));
        let run = RunDir::take(dir.path()).expect("free again");
        run.session_listener().expect("replaces the stale socket");
    }

    #[test]
    fn what_is_not_a_socket_is_left_alone() {
        let dir = tempfile::tempdir().expect("a directory");
        let run = RunDir::take(dir.path()).expect("taken");
        fs::write(names::api_socket(dir.path()), "precious").expect("written");
        let text = format!("{:#}", run.api_listener(None).expect_err("in the way"));
        assert!(text.contains("is not a socket"), "{text}");
        assert_eq!(
            fs::read(names::api_socket(dir.path())).expect("there"),
            b"precious"
        );
    }
}
