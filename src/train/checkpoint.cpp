#include "src/train/checkpoint.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <iostream>
#include <set>

#include "data/files.h"
#include "src/train/checkpoint_file.h"
#include "src/train/rank_text.h"

namespace attamba {

namespace {

namespace fs = std::filesystem;

constexpr std::string_view kPrefix = "step-", kAttempt = ".tmp-", kReplaced = "replaced", kRemoved = "removed";
/// Room to leave besides the files themselves: the manifest, and what file systems need for themselves.
constexpr std::uint64_t kSpareBytes = std::uint64_t{1} << 20;

bool is_attempt(const fs::path& path) {
  const std::string name = path.filename();
  return name.starts_with(kPrefix) && name.find(kAttempt) != std::string::npos;
}

std::optional<std::int64_t> step_of(const fs::path& path) {
  const std::string name = path.filename();
  if (!name.starts_with(kPrefix)) {
    return std::nullopt;
  }
  const std::string digits = name.substr(kPrefix.size());
  const bool numeric = !digits.empty() && digits.size() < 19 && digits.find_first_not_of("0123456789") == std::string::npos;
  return numeric ? std::optional(std::stoll(digits)) : std::nullopt;
}

/// Where one is between being there and being removed or replaced.
fs::path aside(const fs::path& checkpoint, std::string_view why) {
  return concat(checkpoint.string(), kAttempt, why);
}

/// Checkpoints that were being replaced when the program was killed take their places again.
void restore_replaced(const fs::path& folder) {
  for (const fs::directory_entry& entry : fs::directory_iterator(folder)) {
    const std::string path = entry.path();
    const std::size_t name_end = path.rfind(kAttempt);
    if (is_attempt(path) && path.substr(name_end + kAttempt.size()) == kReplaced && !fs::exists(path.substr(0, name_end))) {
      fs::rename(path, path.substr(0, name_end));
    }
  }
}

/// A checkpoint is there as a whole or not at all, also after a power cut.
void remove_checkpoint(const fs::path& checkpoint) {
  const fs::path removed = aside(checkpoint, kRemoved);
  fs::rename(checkpoint, removed);
  sync_folder(checkpoint.parent_path());
  fs::remove_all(removed);
}

/// Puts a whole folder in the place of a target that may exist, in one step where the file system can; elsewhere, at every
/// moment there is the new one, or the old one where restore_replaced finds it. Returns where the old one is then, if there was
/// one.
fs::path put_in_place(const fs::path& folder, const fs::path& target) {
  if (!fs::exists(target)) {
    fs::rename(folder, target);
    return {};
  }
  if (::renameat2(AT_FDCWD, folder.c_str(), AT_FDCWD, target.c_str(), RENAME_EXCHANGE) == 0) {
    return folder;
  }
  const fs::path old = aside(target, kReplaced);
  fs::rename(target, old);
  fs::rename(folder, target);
  return old;
}

SaveFailed save_failed(std::int64_t step, std::string_view reason) {
  return SaveFailed(concat("save failed: there is no checkpoint of step ", step, " (earlier ones are untouched): ", reason));
}

constexpr char kWritten = '+', kNothing = '0', kNotWritten = '-';

/// The files that ranks report, or the first failure as an exception.
std::vector<SavedFile> files_from(const std::vector<std::string>& reports) {
  std::vector<SavedFile> files;
  for (std::size_t rank = 0; rank < reports.size(); ++rank) {
    const std::string& report = reports[rank];
    require(report.front() != kNotWritten, reports.size() > 1 ? concat("rank ", rank, ": ") : "", report.substr(1));
    if (report.front() == kWritten) {
      files.push_back(saved_file_from_text(std::string_view(report).substr(1)));
    }
  }
  return files;
}

Checkpoint parse(const fs::path& folder, const std::string& manifest) {
  Checkpoint checkpoint{.folder = folder, .manifest = manifest_from_text(manifest, (folder / kCheckpointManifest).string())};
  const auto named = step_of(folder);
  require(!named || *named == checkpoint.manifest.state.step, folder.string(), ": holds step ", checkpoint.manifest.state.step);
  return checkpoint;
}

/// Reads every byte of the files, this rank those that are its turn. Returns the first damage that any rank found, or nothing.
std::string find_damage(const Checkpoint& checkpoint, Communicator& communicator) {
  std::string damage;
  const std::vector<SavedFile>& files = checkpoint.manifest.files;
  const auto first = static_cast<std::size_t>(communicator.rank()), ranks = static_cast<std::size_t>(communicator.size());
  for (std::size_t i = first; damage.empty() && i < files.size(); i += ranks) {
    try {
      check_checkpoint_file(checkpoint.folder, files[i]);
    } catch (const std::exception& error) {
      damage = error.what();
    }
  }
  for (const std::string& found : gather_text(damage, communicator)) {
    if (!found.empty()) {
      return found;
    }
  }
  return {};
}

void pass_over(std::string_view reason) {
  std::cerr << "attamba: passing over a damaged checkpoint: " << reason << '\n';
}

/// A file is there and has the size that the manifest says.
bool looks_whole(const Checkpoint& checkpoint) {
  return std::all_of(checkpoint.manifest.files.begin(), checkpoint.manifest.files.end(), [&](const SavedFile& file) {
    std::error_code error;
    return fs::file_size(checkpoint.folder / file.name, error) == file.bytes && !error;
  });
}

/// Those with a good manifest and all of their files, newest first.
std::vector<Checkpoint> whole_checkpoints(const fs::path& folder) {
  std::vector<Checkpoint> whole;
  for (const auto& [step, path] : list_checkpoints(folder)) {
    try {
      Checkpoint checkpoint = open_checkpoint(path);
      if (looks_whole(checkpoint)) {
        whole.push_back(std::move(checkpoint));
      }
    } catch (const std::exception&) {
      continue;  // cannot be read, now or ever: not for a program to judge
    }
  }
  return whole;
}

}  // namespace

fs::path checkpoint_path(const fs::path& folder, std::int64_t step) {
  const std::string digits = std::to_string(step);
  return folder / (std::string(kPrefix) + std::string(digits.size() < 9 ? 9 - digits.size() : 0, '0') + digits);
}

std::vector<std::pair<std::int64_t, fs::path>> list_checkpoints(const fs::path& folder) {
  std::vector<std::pair<std::int64_t, fs::path>> found;
  if (fs::exists(folder)) {
    for (const fs::directory_entry& entry : fs::directory_iterator(folder)) {
      if (const auto step = step_of(entry.path()); step && entry.is_directory()) {
        found.emplace_back(*step, entry.path());
      }
    }
  }
  std::sort(found.rbegin(), found.rend());
  return found;
}

void tidy_checkpoints(const fs::path& folder) {
  if (!fs::exists(folder)) {
    return;
  }
  restore_replaced(folder);
  for (const fs::directory_entry& entry : fs::directory_iterator(folder)) {
    if (is_attempt(entry.path())) {
      std::error_code ignored;  // another attempt has another name, so what cannot be removed is in nobody's way
      fs::remove_all(entry.path(), ignored);
    }
  }
}

SaveAttempt begin_save(const fs::path& folder, std::int64_t step, const std::vector<StateSlice>& slices,
                       Communicator& communicator) {
  auto bytes = static_cast<std::int64_t>(checkpoint_file_bytes(slices));
  communicator.all_reduce_sum({&bytes, {DType::int64, {1}}});
  const fs::path target = checkpoint_path(folder, step);
  try {
    const std::string attempt = on_rank_0(
        [&] {
          if (!fs::exists(folder)) {
            make_folder(folder);
            sync_folder(fs::absolute(folder).parent_path());
          }
          tidy_checkpoints(folder);
          const std::uint64_t needed = static_cast<std::uint64_t>(bytes) + kSpareBytes, free = free_bytes(folder);
          require(needed <= free, folder.string(), ": no room, ", needed, " bytes needed, ", free,
                  " free; free some space or choose another run.folder");
          const auto now = std::chrono::system_clock::now().time_since_epoch();
          const auto stamp = std::chrono::duration_cast<std::chrono::milliseconds>(now).count();
          const std::string path = concat(target.string(), kAttempt, stamp, '-', ::getpid());
          fs::create_directory(path);
          return path;
        },
        communicator);
    return {.folder = attempt, .target = target};
  } catch (const std::exception& error) {
    throw save_failed(step, error.what());
  }
}

std::string write_share(const SaveAttempt& attempt, int rank, const std::vector<StateSlice>& slices,
                        const std::atomic<bool>* cancelled) {
  if (slices.empty()) {
    return {kNothing};
  }
  char name[32];
  std::snprintf(name, sizeof name, "rank-%05d.h5", rank);
  try {
    return kWritten + to_text(write_checkpoint_file(attempt.folder / name, slices, cancelled));
  } catch (const std::exception& error) {
    return unwritten_share(error.what());
  }
}

std::string unwritten_share(std::string_view reason) {
  return kNotWritten + std::string(reason);
}

void publish_save(const SaveAttempt& attempt, const TrainingState& state, const std::vector<std::string>& reports) {
  bool placed = false;
  fs::path old;
  try {
    const std::string manifest = to_text(make_manifest(state, files_from(reports)));
    write_file_atomically(attempt.folder / kCheckpointManifest, manifest);  // syncs the folder, too
    old = put_in_place(attempt.folder, attempt.target);
    placed = true;
    sync_folder(attempt.target.parent_path());
  } catch (const std::exception& error) {
    if (placed) {  // and so is the old one, under another name
      throw SaveFailed(concat("save failed: the checkpoint of step ", state.step,
                              " is there, but might not outlast a power cut: ", error.what()));
    }
    std::error_code ignored;
    fs::remove_all(attempt.folder, ignored);
    throw save_failed(state.step, error.what());
  }
  std::error_code ignored;  // the next start or save tries again
  fs::remove_all(old, ignored);
}

void commit_save(const SaveAttempt& attempt, const TrainingState& state, const std::string& report,
                 Communicator& communicator) {
  const std::vector<std::string> reports = gather_text(report, communicator);
  try {
    on_rank_0(
        [&] {
          publish_save(attempt, state, reports);
          return std::string();
        },
        communicator);
  } catch (const std::exception& error) {
    throw SaveFailed(error.what());
  }
}

void save_checkpoint(const fs::path& folder, const TrainingState& state, const std::vector<StateSlice>& slices,
                     Communicator& communicator) {
  const SaveAttempt attempt = begin_save(folder, state.step, slices, communicator);
  commit_save(attempt, state, write_share(attempt, communicator.rank(), slices), communicator);
}

Checkpoint open_checkpoint(const fs::path& folder) {
  return parse(folder, read_whole_file(folder / kCheckpointManifest));
}

Checkpoint checked_checkpoint(const fs::path& folder, Communicator& communicator) {
  Checkpoint checkpoint = parse(folder, on_rank_0([&] { return read_whole_file(folder / kCheckpointManifest); }, communicator));
  const std::string damage = find_damage(checkpoint, communicator);
  require(damage.empty(), damage);
  return checkpoint;
}

std::optional<Checkpoint> newest_checkpoint(const fs::path& folder, Communicator& communicator, bool to_go_back_to) {
  std::vector<std::pair<std::int64_t, fs::path>> found;
  std::string reason;
  bool unwanted = false;
  if (communicator.rank() == 0) {
    found = list_checkpoints(folder);
  }
  const std::size_t count = found.size();
  // Rank 0 goes down its list to the next one with a good manifest, and tells the others the manifest itself.
  for (std::size_t next = 0;; ++next) {
    const std::string manifest = on_rank_0(
        [&] {
          for (; next < count; ++next) {
            try {
              std::string text = read_whole_file(found[next].second / kCheckpointManifest);
              const Checkpoint checkpoint = parse(found[next].second, text);
              if (!to_go_back_to || checkpoint.manifest.state.skipped_in_a_row == 0) {
                return text;
              }
              unwanted = true;
            } catch (const std::exception& error) {
              pass_over(error.what());
              reason = error.what();
            }
          }
          require(count == 0 || unwanted, folder.string(), ": holds ", count, " checkpoints but none is whole (", reason,
                  "); restore one, or start again in another run.folder");
          return std::string();
        },
        communicator);
    if (manifest.empty()) {
      return std::nullopt;
    }
    Checkpoint checkpoint{.folder = {}, .manifest = manifest_from_text(manifest, "the manifest that rank 0 chose")};
    checkpoint.folder = checkpoint_path(folder, checkpoint.manifest.state.step);
    const std::string damage = find_damage(checkpoint, communicator);
    if (damage.empty()) {
      return checkpoint;
    }
    if (communicator.rank() == 0) {
      pass_over(damage);
      reason = damage;
    }
  }
}

void remove_old_checkpoints(const fs::path& folder, const Retention& retention) {
  if (retention.keep <= 0) {
    return;
  }
  const std::vector<Checkpoint> whole = whole_checkpoints(folder);
  std::set<fs::path> kept;
  const Checkpoint* best = nullptr;
  bool can_go_back = false;
  for (const Checkpoint& checkpoint : whole) {
    const TrainingState& state = checkpoint.manifest.state;
    const bool newest = kept.size() < static_cast<std::size_t>(retention.keep);
    const bool newest_good = !can_go_back && state.skipped_in_a_row == 0;
    can_go_back = can_go_back || newest_good;
    if (newest || newest_good || (retention.keep_every > 0 && state.step % retention.keep_every == 0)) {
      kept.insert(checkpoint.folder);
    }
    if (state.validation_loss && (best == nullptr || *state.validation_loss < *best->manifest.state.validation_loss)) {
      best = &checkpoint;
    }
  }
  if (retention.keep_best && best != nullptr) {
    kept.insert(best->folder);
  }
  for (const Checkpoint& checkpoint : whole) {
    if (kept.count(checkpoint.folder) == 0) {
      remove_checkpoint(checkpoint.folder);
    }
  }
}

void remove_bad_checkpoints(const fs::path& folder, std::int64_t step) {
  for (const Checkpoint& checkpoint : whole_checkpoints(folder)) {
    const TrainingState& state = checkpoint.manifest.state;
    if (state.step > step && state.skipped_in_a_row > 0) {
      remove_checkpoint(checkpoint.folder);
    }
  }
}

void note_validation_loss(const fs::path& folder, double loss) {
  CheckpointManifest manifest = open_checkpoint(folder).manifest;
  manifest.state.validation_loss = loss;
  write_file_atomically(folder / kCheckpointManifest, to_text(manifest));
}

}  // namespace attamba
