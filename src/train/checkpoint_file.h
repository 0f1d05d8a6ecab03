// One rank's file of a checkpoint: written in one pass with its checksums, and checked before anybody looks into it.
#pragma once

#include <atomic>
#include <filesystem>
#include <span>

#include "src/train/checkpoint_manifest.h"

namespace attamba {

/// How large the file of these slices is. Their values are not looked at.
std::uint64_t checkpoint_file_bytes(std::span<const StateSlice> slices);

/// Writes the slices, which lie in host memory, and syncs the file. An error names the file, the reason, the bytes that it
/// needs and those that are free; no file is left behind then. Stops with an error once `cancelled` (may be null) is set.
SavedFile write_checkpoint_file(const std::filesystem::path& path, std::span<const StateSlice> slices,
                                const std::atomic<bool>* cancelled = nullptr);

/// Reads every byte of FOLDER/NAME, with all threads of this rank. Throws an Error when size or checksum are not the
/// manifest's, which names the file and the first tensor that is damaged with its place.
void check_checkpoint_file(const std::filesystem::path& folder, const SavedFile& file);

/// Bytes that a user may still write to the file system of an existing path; the largest number where it does not say.
std::uint64_t free_bytes(const std::filesystem::path& path);

}  // namespace attamba
