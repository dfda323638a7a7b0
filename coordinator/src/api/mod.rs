//! `api.sock`: the coordinator over HTTP/1.1 and JSON, for `curl --unix-socket`, Prometheus and the
//! `spillway` command. The routes are in [`routes`]; every error is `{"error": "..."}` and says what
//! happened and what to do.
//!
//! [`http`] is shared by both ends; [`server`] and [`client`] are one end each.

pub mod client;
mod events;
pub mod http;
pub mod metrics;
mod reply;
pub mod routes;
pub mod server;

pub use client::{Client, ClientError};
pub use server::{Limits, serve, serve_with};
