// One pipeline stage of a decoder, as plain data that all instruction sets share.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastserve {

// Outputs of a matrix that lie next to each other: [panels][units of input][PANEL].
constexpr int PANEL = 32;
constexpr int MAX_HEAD_DIM = 512;

// 8-bit weights have a scale for so many inputs of an output.
constexpr int BYTE_GROUP = 64;
constexpr int BYTE_GROUP_BYTES = PANEL * (4 + BYTE_GROUP);
constexpr int groups_of(int inputs) { return (inputs + BYTE_GROUP - 1) / BYTE_GROUP; }
// A row of a product's input as bytes, with a scale and an offset for each group.
constexpr size_t byte_row_bytes(int inputs) {
  return static_cast<size_t>(groups_of(inputs)) * (BYTE_GROUP + 8);
}

// A unit is 32 bits along the reduced dimension: one float32, or two neighbouring bfloat16.
using Unit = uint32_t;

struct Bfloat16 {
  uint16_t bits;
};

template <class T>
constexpr int per_unit() {
  return static_cast<int>(sizeof(Unit) / sizeof(T));
}

// The numbers of these enumerations are those of library.py.
enum DType : int32_t { FLOAT32, BFLOAT16 };
enum NormKind : int32_t { RMS_NORM, LAYER_NORM };
enum Activation : int32_t { SILU, GELU, GELU_TANH, RELU };
enum Verdict : int32_t { UNKNOWN, GO_ON, ABANDON };  // on a step that is computed ahead
enum MatrixName : int32_t { QKV, PROJECTION, FC1, FC2, MATRICES, OUTPUT = QKV };
enum VectorName : int32_t {
  INPUT_NORM,
  FEED_FORWARD_NORM = INPUT_NORM + 2,
  POST_ATTENTION_NORM = FEED_FORWARD_NORM + 2,
  POST_FEED_FORWARD_NORM = POST_ATTENTION_NORM + 2,
  QUERY_NORM = POST_FEED_FORWARD_NORM + 2,
  KEY_NORM = QUERY_NORM + 2,
  BIASES = KEY_NORM + 2,  // one for each matrix
  VECTORS = BIASES + MATRICES,
  FINAL_NORM = INPUT_NORM,
};

extern "C" {

// What a stage looks like; all sizes are those of this rank.
struct StageConfig {
  int32_t instruction_set, threads, dtype, layers, hidden, feed_forward, kv_heads, group, head_dim;
  int32_t block_size, vocabulary, norm, activation, gated, ropes, first, last;
  int32_t ranks, first_token;  // that share the layers; of the embedding's rows on this one
  int32_t has_byte_weights;
  int32_t norms_whole_projection;  // queries, and keys, of all heads together
  float norm_epsilon, attention_scale, attention_softcap, embedding_scale, residual_scale;
  int64_t weight_bytes;
  void* pool;
  // Gathers `count` floats of each rank, in the order of the ranks; not 0 when that failed.
  int (*gather)(const float* own, float* all, int64_t count);
};

// One step: sequences of new tokens, one after the other.
struct StepInput {
  int32_t tokens, sequences, samples, max_context;
  const int32_t *token_ids, *positions, *slots;         // [tokens]
  const int32_t *first_row, *rows, *start, *table_at;   // [sequences]
  const int32_t *tables, *sample_rows;                  // block ids; [samples]
  const float* hidden_in;                               // [tokens, hidden]; not on the first stage
  float *hidden_out, *logits;                           // on all but the last stage; on the last
  float* normed;                                        // [samples, hidden] there, or null
  int32_t (*ask)();  // a Verdict, asked in each layer while it is UNKNOWN; null: nobody is asked
};
}

// Panels of 32-bit units [units][PANEL], or of groups of bytes (bytes.inl).
struct Matrix {
  const char* panels = nullptr;
  size_t panel_bytes = 0;
  int inputs = 0, units = 0, panel_count = 0;
  int byte_groups = 0;           // of an output's 8-bit weights, 0 where they have more bits
  int group = 1;                 // panels that one thread computes one after the other
  const Matrix* next = nullptr;  // which is read after this one

  int groups() const { return panel_count / group; }
  const char* panel(int number) const { return panels + number * panel_bytes; }
  const Unit* units_at(int number) const { return reinterpret_cast<const Unit*>(panel(number)); }
};

struct Rope {
  const float* frequencies = nullptr;  // [pairs]
  int pairs = 0;                       // (i, i + pairs) of a head are rotated
  float factor = 1.0f;
};

struct Layer {
  Matrix matrices[MATRICES];
  const float* vectors[VECTORS] = {};  // a norm's weight, and after it its bias; null if none
  int rope = -1, window = 0;           // none, no limit
};

// Query heads [first, first + count) of all new tokens of a sequence that share a key-value head,
// counted as token * group + head.
struct AttentionItem {
  int sequence, kv_head, first, count;
};

// Buffers of a step, of `capacity` rows each; widths are rounded up to whole panels.
struct Workspace {
  int capacity = 0, ffn_width = 0, hidden_width = 0, qkv_width = 0, heads_width = 0;
  float *hidden = nullptr, *qkv = nullptr, *added = nullptr, *cosines = nullptr, *sines = nullptr;
  float* gathered = nullptr;  // what is added, of each rank
  void *normed = nullptr, *query = nullptr, *attended = nullptr, *activated = nullptr;
  char* bytes = nullptr;  // of the input of a product with 8-bit weights
  size_t byte_row = 0;    // bytes of the longest such row
};

class Team;

struct Stage {
  StageConfig config;
  Layer* layers = nullptr;  // one more than there are: the final norm and the output matrix
  Rope* ropes = nullptr;
  const void *embedding = nullptr, *position_table = nullptr;  // rows of `hidden`; null if none
  Team* team = nullptr;
  Workspace work;
  char** own_rows = nullptr;  // of each thread: normed rows of a small step
  char** own_bytes = nullptr;  // the same as bytes
  char** scores = nullptr;     // of each thread
  int score_width = 0;        // floats
  StepInput step;
  const AttentionItem* items = nullptr;
  int item_count = 0;
  bool has_lost_rank = false;
  int32_t verdict = GO_ON;
};

// Steps of at most this many rows are normed by each thread for itself, which saves a barrier.
constexpr int OWN_ROWS = 8;

inline int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// The work of one thread of a step.
using StageFunction = void (*)(Stage&, int thread);

// Of each row of logits [rows][columns]: the first of its largest values, and which it is.
using LargestFunction = void (*)(const float*, int rows, int columns, int32_t* tokens, float* values);

// Lays out rows [outputs][inputs] in 8 bits, as every `step`-th panel from `first` on.
using PackFunction = void (*)(char* to, const void* from, int outputs, int inputs, int first, int step);

struct Kernels {
  StageFunction run;
  PackFunction pack_bytes;
  LargestFunction find_largest;
  int attention_rows;  // of an item, at most
};

Kernels portable_kernels(DType dtype);
Kernels avx2_kernels(DType dtype);
Kernels avx512_kernels(DType dtype);
Kernels avx512_bf16_kernels();

// A part of [0, total).
struct Part {
  int from = 0, to = 0;
  bool is_last = false;  // of its thread's share
};

// Threads of a stage; see threads.cpp. Not inline, so that each has one version for all machines.
void wait_for_team(Stage& stage);
bool take_part(Stage& stage, int total, int chunk, Part& part);
// Where the share of [0, total) begins of which this thread takes single ones first.
int first_of_own(const Stage& stage, int total);
// Have `rows` rows of what is added come from all ranks; on one thread, while the others wait.
void gather_rows(Stage& stage, int rows);

}  // namespace fastserve
