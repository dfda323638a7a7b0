//! The daemon over its session socket, with processes that are not quite what they should be.
//! No device and no driver is needed.

mod adversaries;
mod claims;
mod client;
mod death;
mod host;
mod identity;
mod lifecycle;
mod pages;
mod registration;
