// Checkpoints are whole or absent, fit any number of ranks, and what is damaged is found before anything is loaded.
#include "src/train/checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <csignal>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <mutex>

#include "data/hdf5_handle.h"
#include "tests/train/checkpoint_test_support.h"
#include "tests/train/thread_ranks.h"

namespace attamba {
namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::HasSubstr;

class Checkpoints : public CheckpointTest {
 protected:
  void save_on_ranks(int ranks, std::int64_t step, SomeState& state) {
    ThreadRanks::run(ranks, [&](Communicator& communicator) {
      save_checkpoint(folder_, at_step(step), even_share(state.tensors(), communicator.rank(), communicator.size()),
                      communicator);
    });
  }
};

TEST_F(Checkpoints, ComeBackWithEverythingThatWasSaved) {
  SomeState saved(1), loaded;
  TrainingState state = at_step(12);
  state.validation_loss = 0.1 + 0.2;
  state.passed_over = 3;
  state.norms = {1.0 / 3, 2e-300};
  state.skipped_in_a_row = 2;
  state.rollbacks = 1;
  save_checkpoint(folder_, state, whole_slices(saved.tensors()), alone_);
  const auto newest = newest_checkpoint(folder_, alone_);
  ASSERT_TRUE(newest.has_value());
  load_slices(*newest, whole_slices(loaded.tensors()));
  EXPECT_EQ(loaded, saved);
  const TrainingState& found = newest->manifest.state;
  EXPECT_EQ(found.step, 12);
  EXPECT_EQ(found.updates, 11);
  EXPECT_EQ(found.seconds, 1.5);
  EXPECT_EQ(found.passed_over, 3);
  EXPECT_EQ(found.norms, state.norms);
  EXPECT_EQ(found.skipped_in_a_row, 2);
  EXPECT_EQ(found.rollbacks, 1);
  EXPECT_EQ(found.data_fingerprint, "abc");
  EXPECT_EQ(found.configuration, state.configuration);
  EXPECT_EQ(found.validation_loss, state.validation_loss);
}

TEST_F(Checkpoints, AnyNumberOfRanksLoadsWhatAnyNumberWrote) {
  SomeState saved(2);
  std::uint32_t state_crc = 0;
  for (int writers = 1; writers <= 8; ++writers) {
    save_on_ranks(writers, writers, saved);
    const std::uint32_t crc = open_checkpoint(path(writers)).manifest.state_crc();
    EXPECT_EQ(crc, writers == 1 ? crc : state_crc) << "the state's checksum must not depend on the number of ranks";
    state_crc = crc;
    EXPECT_EQ(std::distance(fs::directory_iterator(path(writers)), fs::directory_iterator()), writers + 1);
    for (int readers = 1; readers <= 8; ++readers) {
      SomeState loaded;
      ThreadRanks::run(readers, [&](Communicator& communicator) {
        const auto newest = newest_checkpoint(folder_, communicator);
        ASSERT_TRUE(newest && newest->manifest.state.step == writers);
        load_slices(*newest, even_share(loaded.tensors(), communicator.rank(), communicator.size()));
      });
      EXPECT_EQ(loaded, saved) << writers << " ranks wrote, " << readers << " read";
    }
  }
}

TEST_F(Checkpoints, FilesAreHdf5ThatOtherProgramsRead) {
  SomeState saved(3);
  save_on_ranks(2, 1, saved);
  const Hdf5File first(H5Fopen(file(1).c_str(), H5F_ACC_RDONLY, H5P_DEFAULT), "open the first file");
  const Hdf5File second(H5Fopen(file(1, "rank-00001.h5").c_str(), H5F_ACC_RDONLY, H5P_DEFAULT), "open the second file");
  std::vector<float> found(1000);
  hsize_t cut = 0;
  const Checkpoint checkpoint = open_checkpoint(path(1));
  for (const SavedSlice& piece : checkpoint.manifest.files[0].slices) {
    cut = piece.slice.name == "parameters/layers.0.w" ? static_cast<hsize_t>(piece.slice.end) : cut;
  }
  ASSERT_GT(cut, 0u);
  ASSERT_LT(cut, 1000u);
  const std::string name = "parameters/layers.0.w";
  const Hdf5Dataset head(H5Dopen2(first.get(), concat(name, "[0:", cut, "]").c_str(), H5P_DEFAULT), "find the head");
  const Hdf5Dataset tail(H5Dopen2(second.get(), concat(name, "[", cut, ":1000]").c_str(), H5P_DEFAULT), "find the tail");
  ASSERT_GE(H5Dread(head.get(), H5T_NATIVE_FLOAT, H5S_ALL, H5S_ALL, H5P_DEFAULT, found.data()), 0);
  ASSERT_GE(H5Dread(tail.get(), H5T_NATIVE_FLOAT, H5S_ALL, H5S_ALL, H5P_DEFAULT, found.data() + cut), 0);
  EXPECT_EQ(found, saved.weights);
  std::vector<std::int64_t> shape(2);
  const Hdf5Attribute attribute(H5Aopen(tail.get(), "shape", H5P_DEFAULT), "find the shape");
  ASSERT_GE(H5Aread(attribute.get(), H5T_NATIVE_INT64, shape.data()), 0);
  EXPECT_EQ(shape, (std::vector<std::int64_t>{40, 25}));
}

TEST_F(Checkpoints, NoneIsNoneAndTheNewestWholeOneIsTaken) {
  SomeState state(1);
  EXPECT_FALSE(newest_checkpoint(folder_ / "nowhere", alone_).has_value());
  EXPECT_EQ(newest(), -1);
  for (const std::int64_t step : {9, 10, 100}) {
    save(step, state);
  }
  EXPECT_EQ(newest(), 100);
  fs::create_directories(folder_ / "step-000000200.tmp-1-2");
  fs::create_directories(folder_ / "step-banana");
  EXPECT_EQ(newest(), 100);
  fs::rename(path(100), path(101));
  EXPECT_EQ(newest(), 10) << "a folder that holds another step than its name says";
  fs::rename(path(101), path(100));
  fs::remove(path(100) / "manifest.json");
  EXPECT_EQ(newest(), 10);
}

/// Mutations per damaged file; ATTAMBA_TRIALS asks for more.
int trials(int usual) {
  const char* const asked = std::getenv("ATTAMBA_TRIALS");
  return asked == nullptr ? usual : std::atoi(asked);
}

TEST_F(Checkpoints, EveryFlippedOrMissingByteIsFound) {
  SomeState state(1);
  save_on_ranks(2, 1, state);
  save_on_ranks(2, 2, state);
  RandomStream random(7);
  const int count = trials(200);
  for (const char* name : {"rank-00000.h5", "rank-00001.h5", "manifest.json"}) {
    const std::string good = read_file(file(2, name));
    for (int mutation = 0; mutation < count; ++mutation) {
      std::string bad = good;
      const auto at = static_cast<std::size_t>(random.below(good.size()));
      if (mutation % 4 == 0) {
        bad.resize(at);
      } else {
        bad[at] = static_cast<char>(bad[at] ^ (1 << random.below(8)));
      }
      write_file(file(2, name), bad);
      testing::internal::CaptureStderr();
      const std::int64_t found = newest();
      const std::string said = testing::internal::GetCapturedStderr();
      ASSERT_EQ(found, 1) << "mutation " << mutation << " of " << name << " at " << at;
      ASSERT_THAT(said, AllOf(HasSubstr("passing over"), HasSubstr(name))) << "at " << at;
    }
    write_file(file(2, name), good);
  }
  EXPECT_EQ(newest(), 2);
  fs::rename(file(2), folder_ / "other");
  EXPECT_EQ(newest(), 1) << "a file is gone";
  fs::copy(file(2, "rank-00001.h5"), file(2));
  EXPECT_EQ(newest(), 1) << "a file is another rank's";
}

TEST_F(Checkpoints, DamageIsNamedByFileTensorAndPlace) {
  SomeState state(1);
  save_on_ranks(3, 1, state);
  const Checkpoint checkpoint = open_checkpoint(path(1));
  const SavedFile& saved = checkpoint.manifest.files[2];
  const SavedSlice& piece = saved.slices.front();
  std::string bytes = read_file(file(1, "rank-00002.h5"));
  bytes[piece.offset + 5] = static_cast<char>(bytes[piece.offset + 5] ^ 4);
  write_file(file(1, "rank-00002.h5"), bytes);
  const auto check = [&](Communicator& communicator) { checked_checkpoint(path(1), communicator); };
  for (const int ranks : {1, 2, 5}) {
    EXPECT_THAT(error_of([&] { ThreadRanks::run(ranks, check); }),
                AllOf(HasSubstr("rank-00002.h5"), HasSubstr(piece.slice.name), HasSubstr(std::to_string(piece.offset))));
  }
  fs::resize_file(file(1, "rank-00002.h5"), piece.offset + 1);
  EXPECT_THAT(error_of([&] { check(alone_); }),
              AllOf(HasSubstr("rank-00002.h5"), HasSubstr(concat(piece.offset + 1, " bytes")), HasSubstr(piece.slice.name)));
}

TEST_F(Checkpoints, WhenAllAreDamagedItSaysSo) {
  SomeState state(1);
  save(1, state);
  fs::resize_file(file(1), 10);
  EXPECT_THAT(error_of([&] { newest(); }),
              AllOf(HasSubstr("none is whole"), HasSubstr("rank-00000.h5"), HasSubstr("10 bytes")));
}

TEST_F(Checkpoints, AnotherFormatIsSaidToBeOne) {
  fs::create_directories(path(3));
  write_file(path(3) / "manifest.json", "{\"format\": 1, \"step\": 3}");
  EXPECT_THAT(error_of([&] { newest(); }),
              AllOf(HasSubstr("manifest.json"), HasSubstr("format 1"), HasSubstr("reads format 2")));
}

/// While this lives files may not grow beyond a limit, as on a full disk.
class SmallDisk {
 public:
  explicit SmallDisk(rlim_t bytes) : handler_(std::signal(SIGXFSZ, SIG_IGN)) {
    getrlimit(RLIMIT_FSIZE, &before_);
    const rlimit small{bytes, before_.rlim_max};
    setrlimit(RLIMIT_FSIZE, &small);
  }
  ~SmallDisk() {
    setrlimit(RLIMIT_FSIZE, &before_);
    std::signal(SIGXFSZ, handler_);
  }

 private:
  rlimit before_{};
  void (*handler_)(int);
};

TEST_F(Checkpoints, AFullDiskIsEverybodysCleanFailureAndLeavesTheEarlierOne) {
  SomeState state(1);
  save_on_ranks(3, 1, state);
  std::vector<float> big(1 << 20);
  const auto more = [&](Communicator& communicator) {
    auto slices = even_share(state.tensors(), communicator.rank(), communicator.size());
    if (communicator.rank() == 1) {
      slices.push_back(whole_slices({{"parameters/big", {big.data(), {DType::float32, {1 << 20}}}}}).front());
    }
    return slices;
  };
  const auto save = [&](Communicator& communicator) { save_checkpoint(folder_, at_step(2), more(communicator), communicator); };
  {
    const SmallDisk limit(1 << 20);
    int failed = 0;
    std::mutex mutex;
    ThreadRanks::run(3, [&](Communicator& communicator) {
      const std::string message = error_of([&] { save(communicator); });
      const std::lock_guard lock(mutex);
      EXPECT_THAT(message, AllOf(HasSubstr("save failed"), HasSubstr("step 2"), HasSubstr("earlier ones are untouched"),
                                 HasSubstr("rank 1"), HasSubstr("rank-00001.h5: File too large"), HasSubstr("bytes needed"),
                                 HasSubstr(" free")));
      ++failed;
    });
    EXPECT_EQ(failed, 3);
  }
  EXPECT_EQ(newest(), 1);
  EXPECT_EQ(entries(), 1u) << "something was left behind";
  ThreadRanks::run(3, save);
  EXPECT_EQ(newest(), 2);
}

TEST_F(Checkpoints, WhatDoesNotFitTheDiskIsNotEvenBegun) {
  // Nobody has an exbibyte: the values are never looked at.
  std::vector<StateSlice> slices{{.name = "parameters/huge",
                                  .whole = {DType::float32, {std::int64_t{1} << 58}},
                                  .begin = 0,
                                  .end = std::int64_t{1} << 58,
                                  .values = {}}};
  EXPECT_THAT(error_of([&] { save_checkpoint(folder_, at_step(1), slices, alone_); }),
              AllOf(HasSubstr("no room"), HasSubstr("bytes needed"), HasSubstr(" free;"), HasSubstr("run.folder")));
  EXPECT_EQ(entries(), 0u);
}

TEST_F(Checkpoints, TheSameStepIsSavedAgainOverWhatIsThere) {
  SomeState first(1), second(2), loaded;
  fs::create_directories(path(5).string() + ".tmp-1-2");
  write_file(path(5).string() + ".tmp-1-2/rank-00000.h5", "half");
  save(5, first);
  EXPECT_EQ(entries(), 1u) << "an interrupted save was left behind";
  fs::resize_file(file(5), 100);
  save_on_ranks(2, 5, second);
  EXPECT_EQ(entries(), 1u);
  load_slices(open_checkpoint(path(5)), whole_slices(loaded.tensors()));
  EXPECT_EQ(newest(), 5);
  EXPECT_EQ(loaded, second);
}

TEST_F(Checkpoints, OneThatWasBeingReplacedTakesItsPlaceAgain) {
  SomeState state(1), loaded;
  save(5, state);
  fs::rename(path(5), path(5).string() + ".tmp-replaced");  // as a kill leaves it, where two folders cannot be exchanged
  fs::create_directories(path(5).string() + ".tmp-1-2");
  tidy_checkpoints(folder_);
  EXPECT_EQ(entries(), 1u);
  EXPECT_EQ(newest(), 5);
  load_slices(open_checkpoint(path(5)), whole_slices(loaded.tensors()));
  EXPECT_EQ(loaded, state);
  fs::rename(path(5), path(5).string() + ".tmp-replaced");
  save(6, state);
  EXPECT_EQ(entries(), 2u);
  EXPECT_NO_THROW(checked_checkpoint(path(5), alone_));
}

TEST_F(Checkpoints, AnotherModelIsRefusedByName) {
  SomeState state(1);
  save(1, state);
  const Checkpoint checkpoint = open_checkpoint(path(1));
  std::vector<NamedTensor> wider = state.tensors();
  wider[0].tensor.type.shape = {20, 50};
  EXPECT_THAT(error_of([&] { load_slices(checkpoint, whole_slices(wider)); }),
              AllOf(HasSubstr("layers.0.w"), HasSubstr("[40, 25]"), HasSubstr("[20, 50]")));
  std::vector<NamedTensor> other = state.tensors();
  other[1].name = "moment2/layers.0.w";
  EXPECT_THAT(error_of([&] { load_slices(checkpoint, whole_slices(other)); }), HasSubstr("moment2/layers.0.w"));
}

TEST_F(Checkpoints, ElementsThatNobodyOrTwoRanksWriteAreAnError) {
  SomeState state(1);
  std::vector<StateSlice> slices = whole_slices(state.tensors());
  const auto saving = [&] { save_checkpoint(folder_, at_step(1), slices, alone_); };
  slices[0].end = 999;
  slices[0].values.type.shape = {999};
  EXPECT_THAT(error_of(saving), AllOf(HasSubstr("999"), HasSubstr("parameters/layers.0.w"), HasSubstr("no rank")));
  slices = whole_slices(state.tensors());
  StateSlice again = slices[0];
  again.begin = 998;
  again.values.type.shape = {2};
  slices.push_back(again);
  EXPECT_THAT(error_of(saving), AllOf(HasSubstr("998"), HasSubstr("parameters/layers.0.w"), HasSubstr("twice")));
  EXPECT_EQ(entries(), 0u);
}

class Retained : public CheckpointTest {
 protected:
  void save_with_loss(std::int64_t step, double loss) {
    SomeState state(1);
    TrainingState at = at_step(step);
    at.validation_loss = loss;
    save_checkpoint(folder_, at, whole_slices(state.tensors()), alone_);
  }
  std::vector<std::int64_t> left() const {
    std::vector<std::int64_t> steps;
    for (const auto& [step, path] : list_checkpoints(folder_)) {
      steps.push_back(step);
    }
    return steps;
  }
};

TEST_F(Retained, TheNewestEveryNthAndTheBestStay) {
  const auto save_all = [&] {
    for (std::int64_t step = 1; step <= 9; ++step) {
      save_with_loss(step, step == 3 ? 0.5 : 1.0 / static_cast<double>(step) + 1);
    }
  };
  save_all();
  remove_old_checkpoints(folder_, {.keep = 0});
  EXPECT_EQ(left().size(), 9u) << "0 keeps all";
  remove_old_checkpoints(folder_, {.keep = 2, .keep_every = 4, .keep_best = true});
  EXPECT_EQ(left(), (std::vector<std::int64_t>{9, 8, 4, 3}));
  remove_old_checkpoints(folder_, {.keep = 2, .keep_every = 4});
  EXPECT_EQ(left(), (std::vector<std::int64_t>{9, 8, 4}));
  remove_old_checkpoints(folder_, {.keep = 1});
  EXPECT_EQ(left(), (std::vector<std::int64_t>{9}));
}

TEST_F(Retained, AStateToGoBackToStaysAndIsFoundBehindBadSteps) {
  SomeState state(1);
  const auto newest_good = [&] { return newest_checkpoint(folder_, alone_, true); };
  const auto save_after = [&](std::int64_t step, std::int64_t bad_steps) {
    TrainingState at = at_step(step);
    at.skipped_in_a_row = bad_steps;
    save_checkpoint(folder_, at, whole_slices(state.tensors()), alone_);
  };
  save_after(7, 2);
  EXPECT_FALSE(newest_good().has_value());
  save_after(3, 0);
  save_after(4, 0);
  save_after(8, 3);
  remove_old_checkpoints(folder_, {.keep = 1});
  EXPECT_EQ(left(), (std::vector<std::int64_t>{8, 4}));
  EXPECT_EQ(newest(), 8);
  ASSERT_TRUE(newest_good().has_value());
  EXPECT_EQ(newest_good()->manifest.state.step, 4);
  remove_bad_checkpoints(folder_, 4);
  EXPECT_EQ(newest(), 4);
}

TEST_F(Retained, AValidationLossCanBeAddedAndNothingElseChanges) {
  SomeState state(1);
  save(5, state);
  const CheckpointManifest before = open_checkpoint(path(5)).manifest;
  note_validation_loss(path(5), 2.25);
  CheckpointManifest after = checked_checkpoint(path(5), alone_).manifest;
  EXPECT_EQ(after.state.validation_loss, 2.25);
  after.state.validation_loss.reset();
  EXPECT_EQ(to_text(after), to_text(before));
}

TEST_F(Retained, ALossThatIsNotFiniteIsNoneAndSpoilsNothing) {
  for (const double loss : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    fs::remove_all(path(5));
    save_with_loss(3, 1.5);
    save_with_loss(4, loss);
    EXPECT_EQ(newest(), 4);
    EXPECT_FALSE(open_checkpoint(path(4)).manifest.state.validation_loss);
    save_with_loss(5, 2.5);
    remove_old_checkpoints(folder_, {.keep = 1, .keep_best = true});
    EXPECT_EQ(left(), (std::vector<std::int64_t>{5, 3}));
    note_validation_loss(path(5), loss);
    EXPECT_EQ(newest(), 5);
  }
}

TEST_F(Retained, WhatAKillLeavesOfARemovalTheNextSaveRemoves) {
  for (std::int64_t step = 1; step <= 3; ++step) {
    save_with_loss(step, 1);
  }
  fs::create_directory(path(1).string() + ".tmp-removed");
  write_file(path(1).string() + ".tmp-removed/rank-00000.h5", "half");  // in the way of the next removal
  save_with_loss(4, 1);
  EXPECT_EQ(entries(), 4u);
  remove_old_checkpoints(folder_, {.keep = 1});
  EXPECT_EQ(entries(), 1u);
}

TEST_F(Retained, DamagedOnesDoNotCountSoTheLastGoodOneStays) {
  for (std::int64_t step = 1; step <= 5; ++step) {
    save_with_loss(step, 1);
  }
  fs::remove(path(5) / "manifest.json");
  fs::resize_file(file(4), 7);
  remove_old_checkpoints(folder_, {.keep = 1});
  EXPECT_EQ(left(), (std::vector<std::int64_t>{5, 4, 3}));
  EXPECT_EQ(newest(), 3);
}

}  // namespace
}  // namespace attamba
