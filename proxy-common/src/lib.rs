#![no_std]
//! Plain data.
