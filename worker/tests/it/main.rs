//! The worker from outside: what slots make of repositories and servers of every kind.

mod fixture;

mod fetch;

mod slots;

mod consume;
