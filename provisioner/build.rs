//! The migrations are compiled in by a macro that cargo doesn't see reading them.

fn main() {
    println!("cargo:rerun-if-changed=migrations");
}
