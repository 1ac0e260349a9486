// Numbers of a warp, or of a part of it, in shared memory, where lanes read and write global memory side by side.
#pragma once
#include "storage.cuh"

namespace statemix {

// `count` numbers of each of G lanes, which lie one lane after the other in global memory. They travel in pieces of up to 16
// bytes: in each turn, neighbouring lanes move neighbouring pieces, and so whole sectors, whoever they belong to. A lane's
// own pieces are shuffled here by lane, or the lanes of a quarter of a warp would meet on the same banks when each takes
// its own.
template <class S, int count, int G = 32>
struct Staged {
  static constexpr int kBytes = count * sizeof(S), kPiece = kBytes < 16 ? kBytes : 16, kPieces = kBytes / kPiece;
  static_assert(kPiece >= 4 && kPieces * kPiece == kBytes && kPieces <= 8, "pieces are 4, 8 or 16 bytes");
  __align__(16) char bytes[G * kBytes];

  static STATEMIX_DEVICE int place(int piece) {
    constexpr int kLanesOfBanks = 8 / kPieces > 0 ? 8 / kPieces : 1;  // lanes whose pieces fill all banks once
    const int owner = piece / kPieces, own = piece % kPieces;
    return kPiece * (kPieces == 1 ? piece : owner * kPieces + (own ^ (owner / kLanesOfBanks % kPieces)));
  }

  // Begins to copy from where the first lane's numbers are; `lanes`: how many lanes have any.
  STATEMIX_DEVICE void bring(const S* from, int lane, int lanes) {
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const int piece = G * p + lane;
      copy<kPiece>(bytes + place(piece), (const char*)from + lane * kPiece + p * G * kPiece, piece / kPieces < lanes);
    }
  }

  // A lane's numbers, after they have arrived.
  STATEMIX_DEVICE void take(int lane, float (&x)[count]) const {
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      constexpr int kNumbers = kPiece / sizeof(S);
      load_numbers<kNumbers>((const S*)(bytes + place(lane * kPieces + p)), x + p * kNumbers);
    }
  }

  // The other way: each lane puts its numbers, and after a __syncwarp the warp writes them to global memory.
  STATEMIX_DEVICE void put(int lane, const float (&x)[count]) {
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      constexpr int kNumbers = kPiece / sizeof(S);
      store_numbers<kNumbers>((S*)(bytes + place(lane * kPieces + p)), x + p * kNumbers);
    }
  }
  STATEMIX_DEVICE void write_out(S* to, int lane, int lanes) const {
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const int piece = G * p + lane;
      uint32 w[kPiece / 4];
      load_words<kPiece / 4>(bytes + place(piece), w);
      if (piece / kPieces < lanes) store_words<kPiece / 4>((char*)to + piece * kPiece, w);
    }
  }
};

}  // namespace statemix
