// Saving while training goes on: what is on the disk is what was there when the save began, on all ranks or on none.
#include "src/train/checkpoint_writer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <mutex>
#include <thread>

#include "tests/train/checkpoint_test_support.h"
#include "tests/train/thread_ranks.h"

namespace attamba {
namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::Contains;
using testing::Each;
using testing::HasSubstr;
using testing::IsEmpty;

class CheckpointWriting : public CheckpointTest {
 protected:
  /// Runs a writer on every rank.
  void on_ranks(int ranks, CheckpointWriter::Settings settings,
                const std::function<void(CheckpointWriter&, Communicator&)>& body) {
    settings.say = [this](std::string_view text) { said_.emplace_back(text); };  // rank 0 alone
    ThreadRanks::run(ranks, [&](Communicator& communicator) {
      CheckpointWriter writer(folder_, settings, communicator);
      body(writer, communicator);
    });
  }
  /// As training calls it after steps that take a while.
  static void poll_for_a_while(CheckpointWriter& writer, std::int64_t until_step = -1) {
    for (int step = 0; step < 300 && (until_step < 0 || writer.saved_step() != until_step); ++step) {
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
      writer.poll();
    }
  }
  static std::vector<StateSlice> share(SomeState& state, Communicator& communicator) {
    return even_share(state.tensors(), communicator.rank(), communicator.size());
  }

  std::vector<std::string> said_;
};

TEST_F(CheckpointWriting, WhatChangesAfterASaveBeganIsNotInIt) {
  const SomeState before(1);
  on_ranks(3, {}, [&](CheckpointWriter& writer, Communicator& communicator) {
    SomeState state(1);  // each rank trains its own copy, as ranks do
    writer.save(at_step(7), share(state, communicator));
    state = SomeState(2);
    poll_for_a_while(writer, 7);
    EXPECT_EQ(writer.saved_step(), 7);
    EXPECT_GT(writer.stall_seconds(), 0);
  });
  SomeState loaded;
  load_slices(open_checkpoint(path(7)), whole_slices(loaded.tensors()));
  EXPECT_EQ(newest(), 7);
  EXPECT_EQ(loaded, before);
  EXPECT_THAT(said_, IsEmpty());
}

TEST_F(CheckpointWriting, NothingIsACheckpointBeforeAllRanksHaveWrittenIt) {
  on_ranks(2, {}, [&](CheckpointWriter& writer, Communicator& communicator) {
    SomeState state(1);
    writer.save(at_step(1), share(state, communicator));
    communicator.barrier();
    EXPECT_EQ(writer.saved_step(), -1);
    EXPECT_FALSE(fs::exists(path(1)));
    communicator.barrier();
    writer.save_now(at_step(1), share(state, communicator));
    EXPECT_EQ(writer.saved_step(), 1);
  });
  EXPECT_EQ(newest(), 1);
  EXPECT_EQ(entries(), 1u);
}

TEST_F(CheckpointWriting, ASecondSaveWaitsForTheFirstAndSaysSo) {
  SomeState last(2), loaded;
  on_ranks(2, {}, [&](CheckpointWriter& writer, Communicator& communicator) {
    SomeState state(1);
    writer.save(at_step(1), share(state, communicator));
    state = SomeState(2);
    writer.save(at_step(2), share(state, communicator));
    poll_for_a_while(writer, 2);
  });
  EXPECT_EQ(list_checkpoints(folder_).size(), 2u);
  load_slices(open_checkpoint(path(2)), whole_slices(loaded.tensors()));
  EXPECT_EQ(loaded, last);
  EXPECT_THAT(said_, Contains(AllOf(HasSubstr("waited"), HasSubstr("step 1"), HasSubstr("checkpoint.every"))));
}

TEST_F(CheckpointWriting, AFailedSaveIsAMessageAndTheNextOneIsMade) {
  for (const bool background : {true, false}) {
    said_.clear();
    const std::int64_t first = background ? 1 : 5;
    on_ranks(2, {.background = background}, [&](CheckpointWriter& writer, Communicator& communicator) {
      SomeState state(1);
      writer.save(at_step(first), share(state, communicator));
      poll_for_a_while(writer, first);
      if (communicator.rank() == 0) {
        // The folder's place is taken by a file: no save can succeed.
        fs::rename(folder_, folder_.string() + ".away");
        write_file(folder_, "in the way");
      }
      communicator.barrier();
      writer.save(at_step(first + 1), share(state, communicator));
      poll_for_a_while(writer);
      EXPECT_EQ(writer.saved_step(), first);
      EXPECT_THAT(error_of([&] { writer.save_now(at_step(first + 1), share(state, communicator)); }),
                  AllOf(HasSubstr("save failed"), HasSubstr(folder_.string())));
      communicator.barrier();
      if (communicator.rank() == 0) {
        fs::remove(folder_);
        fs::rename(folder_.string() + ".away", folder_);
      }
      communicator.barrier();
      EXPECT_EQ(list_checkpoints(folder_).front().first, first);
      writer.save(at_step(first + 2), share(state, communicator));
      poll_for_a_while(writer, first + 2);
      EXPECT_EQ(writer.saved_step(), first + 2);
    });
    EXPECT_THAT(said_, Each(AllOf(HasSubstr("save failed"), HasSubstr("training goes on"))));
    EXPECT_FALSE(said_.empty());
    EXPECT_EQ(newest(), first + 2);
  }
}

TEST_F(CheckpointWriting, ASaveThatWasGivenUpIsNoCheckpointAndIsSwept) {
  SomeState state(1);
  save(1, state);
  on_ranks(2, {}, [&](CheckpointWriter& writer, Communicator& communicator) {
    writer.save(at_step(2), share(state, communicator));
    communicator.barrier();
  });
  EXPECT_EQ(newest(), 1);
  EXPECT_EQ(entries(), 2u) << "a crash leaves the same behind";
  on_ranks(3, {}, [&](CheckpointWriter& writer, Communicator& communicator) {
    writer.save_now(at_step(2), share(state, communicator));
  });
  EXPECT_EQ(newest(), 2);
  EXPECT_EQ(entries(), 2u);
}

TEST_F(CheckpointWriting, OldOnesGoOnlyAfterTheNewOneIsThere) {
  on_ranks(2, {.retention = {.keep = 2}}, [&](CheckpointWriter& writer, Communicator& communicator) {
    SomeState state(1);
    for (std::int64_t step = 1; step <= 5; ++step) {
      writer.save(at_step(step), share(state, communicator));
      poll_for_a_while(writer, step);
    }
    writer.save_now(at_step(6), share(state, communicator));
  });
  EXPECT_TRUE(fs::exists(path(6)));
  EXPECT_TRUE(fs::exists(path(5)));
  EXPECT_EQ(entries(), 2u);
}

}  // namespace
}  // namespace attamba
