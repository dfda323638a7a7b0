//! What a call changes: before it, so that every answer is known; and after it, when it has succeeded.

use serde_json::{Value, json};

use super::call::{Arguments, Player};
use super::contents::digest;
use super::memory::{host_bytes, pointer};
use super::state::{Pending, Region, Space, State};
use crate::roles::Role;
use crate::trace::Call;

impl Player {
    /// What has to be done before a call, so that every answer is known.
    pub(super) fn before(&mut self, call: &Call, stream: u64, told: &mut Vec<Value>) {
        let first = call.words.first().copied().unwrap_or(0);
        let name = call.name.as_str();
        match name {
            // The program has waited until it was finished.
            "cuStreamQuery" | "cuStreamQuery_ptsz" | "cuEventQuery" if call.status == 0 => {
                self.settle(told)
            }
            "cuEventSynchronize" | "cuStreamDestroy_v2" => self.settle(told),
            // It takes memory along.
            "cuCtxDestroy_v2" => self.read_all(told),
            _ if name.starts_with("cuDevicePrimaryCtxRe") && name != "cuDevicePrimaryCtxRetain" => {
                self.read_all(told);
            }
            "cuMemFreeHost" | "cuMemHostUnregister" => self.settle(told),
            "cuMemFree_v2" | "cuMemFreeAsync" | "cuMemFreeAsync_ptsz" if call.status == 0 => {
                if let Some(region) = self.state.regions.get(&first).copied() {
                    self.wait_and_read(first, region, stream, told);
                }
            }
            "cuMemUnmap" if call.status == 0 => self.unmapping(call, told),
            _ => {}
        }
    }

    /// Digests what is about to be freed.
    pub(super) fn wait_and_read(
        &mut self,
        start: u64,
        region: Region,
        stream: u64,
        told: &mut Vec<Value>,
    ) {
        if !region.known || !self.state.captures.is_empty() {
            return;
        }
        if stream == 0 {
            self.settle(told);
        } else {
            self.own("cuStreamSynchronize", &[stream]);
        }
        if let Some(here) = self.state.address(start) {
            told.push(self.read(here, region.bytes));
        }
    }

    /// Digests what is about to be unmapped; what else its region has stays.
    pub(super) fn unmapping(&mut self, call: &Call, told: &mut Vec<Value>) {
        let (from, bytes) = (call.words[0], call.words[1]);
        let to = from.saturating_add(bytes);
        let touched = self.state.regions.range(..to);
        let touched: Vec<(u64, Region)> = touched
            .filter(|(start, region)| *start + region.bytes > from)
            .map(|(start, region)| (*start, *region))
            .collect();
        for (start, region) in touched {
            let (low, high) = (start.max(from), (start + region.bytes).min(to));
            let part = Region {
                bytes: high - low,
                ..region
            };
            self.wait_and_read(low, part, 0, told);
            self.state.regions.remove(&start);
            if start < low {
                self.state.regions.insert(
                    start,
                    Region {
                        bytes: low - start,
                        ..region
                    },
                );
            }
            if high < start + region.bytes {
                let bytes = start + region.bytes - high;
                self.state.regions.insert(high, Region { bytes, ..region });
            }
        }
    }

    /// What follows from success.
    pub(super) fn after(
        &mut self,
        call: &Call,
        roles: &[Role],
        arguments: &mut Arguments,
        stream: u64,
        told: &mut Vec<Value>,
    ) {
        for (index, &(role, about)) in roles.iter().enumerate() {
            let result = arguments.words[index];
            if !(role.starts_with('>') || role == "io") || result == 0 {
                continue;
            }
            // SAFETY: a result of at least 24 bytes, or 8, made for this argument.
            let value = unsafe { *pointer::<u64>(result) };
            let recorded = call.outputs.get(&index).copied().unwrap_or(0);
            match role {
                ">h" if recorded != 0 => {
                    self.state.handles.insert(recorded, value);
                }
                ">d" => self.allocated(call, recorded, value, (about, arguments), stream),
                ">H" => self
                    .state
                    .add_host(recorded, call.words[about], value, None),
                ">a" => {
                    let bytes = self
                        .state
                        .hosts
                        .get(&call.words[about])
                        .map_or(1, |host| host.bytes);
                    self.state
                        .spaces
                        .insert(recorded, Space { bytes, here: value });
                }
                ">t" => told.push(json!(value)),
                ">f" => told.push(json!({"free": value})),
                ">b" | ">b16" => {
                    let length = if role == ">b" {
                        call.words[about].min(4096)
                    } else {
                        16
                    };
                    let length = usize::try_from(length).unwrap_or(0);
                    // SAFETY: a result of so many bytes, made for this argument.
                    let bytes =
                        unsafe { std::slice::from_raw_parts(pointer::<u8>(result), length) };
                    told.push(json!(format!("{:016x}", digest(bytes))));
                }
                ">v" => told.push(self.attribute(call.words[1], value, arguments.words[about])),
                ">r" => told.push(json!(value.wrapping_sub(arguments.words[about]))),
                _ => {}
            }
        }
        self.copied(call, arguments, stream, told);
        self.changed(call, arguments, stream, told);
    }

    /// Copies: who uses what until when.
    pub(super) fn copied(
        &mut self,
        call: &Call,
        arguments: &Arguments,
        stream: u64,
        told: &mut Vec<Value>,
    ) {
        for &address in &arguments.uses {
            self.state.uses(address, stream);
        }
        if let [to, from] = arguments.uses[..] {
            let unknown = |state: &State, address| {
                state
                    .region(address)
                    .is_none_or(|start| !state.regions[&start].known)
            };
            if unknown(&self.state, from)
                && let Some(start) = self.state.region(to)
                && let Some(region) = self.state.regions.get_mut(&start)
            {
                region.known = false;
            }
        }
        let context = self.context();
        let is_async = call.name.contains("Async");
        if is_async {
            for start in &arguments.hosts {
                if let Some(host) = self.state.hosts.get_mut(start) {
                    host.busy.insert((context, stream));
                }
            }
        }
        let Some((here, bytes)) = arguments.read_back else {
            return;
        };
        // What was read is known only if what it came from is.
        let from = arguments
            .uses
            .first()
            .and_then(|address| self.state.region(*address));
        if from.is_some_and(|start| !self.state.regions[&start].known) {
            return;
        }
        if is_async {
            self.state.pending.push(Pending {
                stream,
                context,
                here,
                bytes,
            });
        } else {
            told.push(json!(format!("{:016x}", digest(host_bytes(here, bytes)))));
        }
    }

    /// Everything else that a call changes.
    pub(super) fn changed(
        &mut self,
        call: &Call,
        arguments: &mut Arguments,
        stream: u64,
        told: &mut Vec<Value>,
    ) {
        let first = call.words.first().copied().unwrap_or(0);
        match call.name.as_str() {
            "cuMemFree_v2" | "cuMemFreeAsync" | "cuMemFreeAsync_ptsz" | "cuMemAddressFree" => {
                self.state.forget(first);
            }
            "cuMemSetAccess" => self.access_given(call),
            "cuMemFreeHost" => {
                self.state.hosts.remove(&first);
            }
            "cuMemHostRegister_v2" => {
                if let Some((own, here)) = arguments.own.take() {
                    self.state.add_host(first, call.words[1], here, Some(own));
                }
            }
            "cuStreamBeginCapture_v2" | "cuStreamBeginCapture_v2_ptsz" => {
                self.state.captures.insert(stream, self.state.tick);
            }
            "cuStreamEndCapture" | "cuStreamEndCapture_ptsz" => {
                self.state.captures.remove(&stream);
            }
            "cuStreamSynchronize" | "cuStreamSynchronize_ptsz" => {
                let context = self.context();
                self.finished(told, |at| at == (context, stream));
            }
            "cuCtxSynchronize" => {
                let context = self.context();
                self.finished(told, |(of, _)| of == context);
            }
            "cuCtxDestroy_v2" => self.lost(),
            name if name.starts_with("cuDevicePrimaryCtxRe") && !name.contains("Retain") => {
                self.lost()
            }
            name if name.starts_with("cuLaunch") && self.state.captures.is_empty() => {
                self.own("cuStreamSynchronize", &[stream]);
            }
            _ => {}
        }
    }
}
