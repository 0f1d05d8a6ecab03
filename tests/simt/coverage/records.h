// What each test launched, as files of a folder: test_simt writes them, kernel_report reads them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <istream>
#include <ostream>
#include <string>
#include <string_view>

namespace attamba::simt {

/// Test programs write records into the folder that this environment variable names.
inline constexpr const char* kRecordsVariable = "ATTAMBA_SIMT_RECORDS";

/// A line of a record: a kernel, the grid that it was launched on, and how often.
struct LaunchRecord {
  std::string kernel;  ///< mangled
  std::int64_t x = 0, y = 0, z = 0;
  int threads = 0;
  std::size_t shared_bytes = 0;
  std::int64_t launches = 0;
};
inline std::ostream& operator<<(std::ostream& out, const LaunchRecord& r) {
  return out << r.kernel << ' ' << r.x << ' ' << r.y << ' ' << r.z << ' ' << r.threads << ' ' << r.shared_bytes << ' '
             << r.launches;
}
inline std::istream& operator>>(std::istream& in, LaunchRecord& r) {
  return in >> r.kernel >> r.x >> r.y >> r.z >> r.threads >> r.shared_bytes >> r.launches;
}

/// The file of a test, which is there when the test has ended, also where it launched nothing.
inline std::filesystem::path record_file(const std::filesystem::path& folder, std::string_view suite, std::string_view test) {
  std::string name = std::string(suite) + "." + std::string(test);
  for (char& letter : name) {
    letter = letter == '/' ? '-' : letter;
  }
  return folder / name;
}

}  // namespace attamba::simt
