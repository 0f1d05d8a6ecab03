// What a power cut could do, read from a trace of the system calls that wrote.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace attamba::faults {

/// Goes through a trace of faults.so and finds the moments at which a power cut would lose what the program counts on:
///  - a file or folder gets its final name before its contents have been synced;
///  - something of a checkpoint that was finished is removed, or its name taken away, before the newest name there is synced.
/// One line each, with the number of the call; empty when there are none.
std::vector<std::string> find_unsynced(const std::filesystem::path& trace);

}  // namespace attamba::faults
