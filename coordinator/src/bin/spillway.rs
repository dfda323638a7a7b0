//! The `spillway` command.

fn main() -> std::process::ExitCode {
    spillway_coordinator::cli::main()
}
