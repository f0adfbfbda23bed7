// Queries of new tokens, and their keys and values into the blocks; once per instruction set.

// Rotate pairs (i, i + head_dim / 2) of one head.
static void rotate(float* head, const float* cosines, const float* sines, int half) {
  for (int i = 0; i < half; i++) {
    const float a = head[i], b = head[i + half];
    head[i] = a * cosines[i] - b * sines[i];
    head[i + half] = b * cosines[i] + a * sines[i];
  }
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
  float* heads = rows_of<float>(stage.work.qkv, row, stage.work.qkv_width);
  T* queries = rows_of<T>(stage.work.query, row, stage.work.heads_width);
  T narrow[MAX_HEAD_DIM];
  for (int kv_head = 0; kv_head < c.kv_heads; kv_head++) {
    for (int n = 0; n < c.group + 2; n++) {
      float* head = heads + (kv_head * (c.group + 2) + n) * dims;
      const float* const* norm = layer.vectors + (n < c.group ? QUERY_NORM : KEY_NORM);
      if (n <= c.group && norm[0]) normalize<float>(c, head, norm, dims, head);
      if (n <= c.group && layer.rope >= 0)
        rotate(head, stage.work.cosines + angles, stage.work.sines + angles, dims / 2);
      copy_row(n < c.group ? queries + (kv_head * c.group + n) * dims : narrow, head, dims);
      if (n == c.group) write_key(blocks.keys(block, kv_head), narrow, slot, c.block_size, dims);
      if (n == c.group + 1) write_value(blocks.values(block, kv_head), narrow, slot, dims);
    }
  }
}
