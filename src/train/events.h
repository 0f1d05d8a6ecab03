// events.jsonl in a run's folder: what happened to the run besides its numbers, one JSON object per line. Nothing is ever taken
// out of it, also when the run goes back to an earlier step.
#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <optional>

namespace attamba {

inline constexpr const char* kEventsFile = "events.jsonl";

/// The step of the last checkpoint that was saved, by the event "saved"; nothing when there was none, or no such file.
std::optional<std::int64_t> last_saved_step(const std::filesystem::path& file);

/// Appends the event with the time of day ("time", seconds since 1970) in one write. Failing is no reason to stop anything, so
/// it is silent.
void append_event(const std::filesystem::path& file, nlohmann::json event);

}  // namespace attamba
