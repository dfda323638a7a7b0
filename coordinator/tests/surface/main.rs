//! What people and programs touch of the coordinator: the API over its socket, and the `spillway`
//! command, in front of a coordinator that only pretends ([`fake`]).

mod cli;
mod doctor;
mod fake;
mod http;
mod real;
mod run;
