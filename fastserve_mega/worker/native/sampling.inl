// The largest logit of each row, which is what a greedy request gets; included once per instruction
// set.

// Values whose largest is compared at a time: only one such block is then searched for it.
constexpr int SEARCHED = 512;

static void find_largest_of_row(const float* row, int columns, int32_t& token, float& value) {
  float largest = -INFINITY;
  int block = 0;
  for (int first = 0; first < columns; first += SEARCHED) {
    const int end = columns - first < SEARCHED ? columns : first + SEARCHED;
    Vec most = all(-INFINITY), sum{};
    int at = first;
    for (; at + LANES <= end; at += LANES) {
      const Vec values = load(row + at);
      most = larger(values, most);
      sum += values * Vec{};  // NaN where one of them is, or an infinity
    }
    float found = largest_of(most), suspect = sum_of(sum);
    for (; at < end; at++) {
      found = row[at] > found ? row[at] : found;
      suspect += row[at] * 0.0f;
    }
    for (at = first; suspect != suspect && at < end; at++) {
      if (row[at] == row[at]) continue;
      token = at, value = row[at];  // a NaN is larger than anything
      return;
    }
    if (found > largest) largest = found, block = first;
  }
  token = block, value = largest;
  while (token + 1 < columns && row[token] != largest) token++;
}

static void find_largest(const float* logits, int rows, int columns, int32_t* tokens, float* values) {
  for (int row = 0; row < rows; row++)
    find_largest_of_row(logits + static_cast<size_t>(row) * columns, columns, tokens[row],
                        values[row]);
}
