//! One model server under `spillway run`, and its answers.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use crate::Show;

/// An answer takes a swap in each direction at most; this is many.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

pub struct Model {
    pub name: String,
    pub checksum: String,
    /// Seconds to the first answer of each request that came after others had their turn, and of those after it.
    pub first_answers: Vec<f64>,
    pub warm_answers: Vec<f64>,
    socket: PathBuf,
    child: Child,
}

impl Model {
    pub fn start(show: &Show, name: &str, weights: &Path, checksum: u64) -> anyhow::Result<Model> {
        let log = File::create(show.folder.join(format!("{name}.log")))?;
        // Under a socket address's length whatever the folder's depth: the server runs in the folder.
        let socket = PathBuf::from(format!("{name}.sock"));
        let child = Command::new(&show.spillway)
            .args(["run", "--workload", name])
            .args(["--request", &format!("{}B", show.request)])
            .args(["--limit", &format!("{}B", show.limit)])
            .arg("--")
            .arg(&show.server)
            .args(["--name", name, "--kv", &format!("{}B", show.kv)])
            .arg("--weights")
            .arg(weights)
            .arg("--listen")
            .arg(&socket)
            .current_dir(&show.folder)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {}", show.spillway.display()))?;
        Ok(Model {
            name: name.to_string(),
            checksum: format!("{checksum:016x}"),
            first_answers: Vec::new(),
            warm_answers: Vec::new(),
            socket: show.folder.join(socket),
            child,
        })
    }

    /// Waits until the server takes connections, which it does when its weights are loaded and checked.
    pub fn wait_ready(&mut self, limit: Duration) -> anyhow::Result<()> {
        let start = Instant::now();
        while UnixStream::connect(&self.socket).is_err() {
            if let Some(status) = self.child.try_wait()? {
                bail!(
                    "{} ended with {status} before it was ready; see its log",
                    self.name
                );
            }
            ensure!(
                start.elapsed() < limit,
                "{} was not ready after {} s",
                self.name,
                limit.as_secs()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn ask(&self, op: &str) -> anyhow::Result<Value> {
        let stream = UnixStream::connect(&self.socket)
            .with_context(|| format!("{} takes no connection", self.name))?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        writeln!(&stream, "{}", serde_json::json!({"op": op}))?;
        let mut line = String::new();
        let read = BufReader::new(&stream).read_line(&mut line);
        let read = read.with_context(|| {
            format!(
                "{} did not answer within {} s",
                self.name,
                ANSWER_LIMIT.as_secs()
            )
        })?;
        ensure!(
            read > 0,
            "{} closed the connection instead of answering",
            self.name
        );
        serde_json::from_str(&line).with_context(|| format!("{} answered {line:?}", self.name))
    }

    /// One request; gives the seconds to its first answer as the server measured them.
    pub fn infer(&mut self, warm: bool) -> anyhow::Result<f64> {
        let answer = self.ask("infer")?;
        ensure!(
            answer.get("ok") == Some(&Value::Bool(true)),
            "{} answered {answer}",
            self.name
        );
        let checksum = answer
            .get("checksum")
            .and_then(Value::as_str)
            .unwrap_or_default();
        ensure!(
            checksum == self.checksum,
            "{}: the weights on the GPU have checksum {checksum}, the file {}",
            self.name,
            self.checksum
        );
        ensure!(
            answer.get("pointers_unchanged") == Some(&Value::Bool(true)),
            "{}: an allocation is not at its address any more",
            self.name
        );
        let seconds = answer
            .get("first_answer_seconds")
            .and_then(Value::as_f64)
            .context("no time in the answer")?;
        if warm {
            self.warm_answers.push(seconds)
        } else {
            self.first_answers.push(seconds)
        }
        Ok(seconds)
    }

    /// Ends the server, which must end well.
    pub fn quit(&mut self) -> anyhow::Result<()> {
        self.ask("quit")?;
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                ensure!(status.success(), "{} ended with {status}", self.name);
                return Ok(());
            }
            ensure!(
                start.elapsed() < Duration::from_secs(20),
                "{} does not end",
                self.name
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
