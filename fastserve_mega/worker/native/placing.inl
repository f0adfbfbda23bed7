// Queries of new tokens, and their keys and values into the blocks; once per instruction set.

// Rotate pairs (i, i + pairs) of one head.
static void rotate(float* head, const float* cosines, const float* sines, int pairs) {
  for (int i = 0; i < pairs; i++) {
    const float a = head[i], b = head[i + pairs];
    head[i] = a * cosines[i] - b * sines[i];
    head[i + pairs] = b * cosines[i] + a * sines[i];
  }
}

// RMSNorm over columns [from, to) of all key-value heads together: all queries, or all keys.
static void norm_projection(const StageConfig& c, float* heads, const float* weight, int from,
                            int to) {
  const int dims = c.head_dim, stride = (c.group + 2) * dims;
  float square = 0.0f;
  for (int kv_head = 0; kv_head < c.kv_heads; kv_head++)
    for (int k = from * dims; k < to * dims; k++) {
      const float value = heads[kv_head * stride + k];
      square += value * value;
    }
  const int size = c.kv_heads * (to - from) * dims;
  const float scale = 1.0f / sqrtf(square / size + c.norm_epsilon);
  for (int kv_head = 0; kv_head < c.kv_heads; kv_head++)
    for (int k = from * dims; k < to * dims; k++) heads[kv_head * stride + k] *= scale * *weight++;
}

template <class T>
static void write_key(Unit* keys, const T* key, int slot, int size, int dims) {
  for (int u = 0; u < dims / per_unit<T>(); u++)
    memcpy(keys + u * size + slot, key + u * per_unit<T>(), sizeof(Unit));
}

template <class T>
static void write_value(Unit* values, const T* value, int slot, int dims) {
  constexpr int N = per_unit<T>();
  T* target = reinterpret_cast<T*>(values) + static_cast<size_t>(slot / N) * dims * N + slot % N;
  for (int e = 0; e < dims; e++) target[e * N] = value[e];
}

// Norm and rotate queries and keys of a token, and put its keys and values into its block.
template <class T>
static void place_token(const Stage& stage, const Layer& layer, const LayerBlocks& blocks, int row) {
  const StageConfig& c = stage.config;
  const int dims = c.head_dim, block = stage.step.slots[row] / c.block_size;
  const int slot = stage.step.slots[row] % c.block_size;
  const size_t rope = layer.rope < 0 ? 0 : layer.rope;
  const size_t angles = (rope * stage.work.capacity + row) * (dims / 2);
  const int pairs = layer.rope < 0 ? 0 : stage.ropes[layer.rope].pairs;
  float* heads = rows_of<float>(stage.work.qkv, row, stage.work.qkv_width);
  if (c.norms_whole_projection) {
    norm_projection(c, heads, layer.vectors[QUERY_NORM], 0, c.group);
    norm_projection(c, heads, layer.vectors[KEY_NORM], c.group, c.group + 1);
  }
  T* queries = rows_of<T>(stage.work.query, row, stage.work.heads_width);
  T narrow[MAX_HEAD_DIM];
  for (int kv_head = 0; kv_head < c.kv_heads; kv_head++) {
    for (int n = 0; n < c.group + 2; n++) {
      float* head = heads + (kv_head * (c.group + 2) + n) * dims;
      const float* const* norm = layer.vectors + (n < c.group ? QUERY_NORM : KEY_NORM);
      if (n <= c.group && norm[0] && !c.norms_whole_projection) normalize<float>(c, head, norm, dims, head);
      if (n <= c.group)
        rotate(head, stage.work.cosines + angles, stage.work.sines + angles, pairs);
      copy_row(n < c.group ? queries + (kv_head * c.group + n) * dims : narrow, head, dims);
      if (n == c.group) write_key(blocks.keys(block, kv_head), narrow, slot, c.block_size, dims);
      if (n == c.group + 1) write_value(blocks.values(block, kv_head), narrow, slot, dims);
    }
  }
}
