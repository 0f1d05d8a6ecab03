#include "src/train/events.h"

#include <fcntl.h>
#include <unistd.h>

#include <ctime>
#include <fstream>
#include <nlohmann/json.hpp>

namespace attamba {

std::optional<std::int64_t> last_saved_step(const std::filesystem::path& file) {
  std::optional<std::int64_t> step;
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) {
    const nlohmann::json event = nlohmann::json::parse(line, nullptr, false);  // a torn line is none
    if (event.is_object() && event.value("event", "") == "saved") {
      step = event.value("step", std::int64_t{0});
    }
  }
  return step;
}

void append_event(const std::filesystem::path& file, nlohmann::json event) {
  event["time"] = static_cast<std::int64_t>(std::time(nullptr));
  const std::string line = event.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
  const int descriptor = ::open(file.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (descriptor >= 0) {
    [[maybe_unused]] const ssize_t written = ::write(descriptor, line.data(), line.size());
    ::close(descriptor);
  }
}

}  // namespace attamba
