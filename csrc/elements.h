// What one element or one row's sums go through, the same on CPU and GPU: lengths, SGD, bfloat16 (docs/math.md 1, 2).
// Included inside a namespace of the includer (csrc/cpu compiles it once per ISA), which defines RF_ELEMENT: what stands before a
// function. V is a float or a vector of floats. <cstdint> is included before.

constexpr float kCancelled = 1e-4f;  // |U| below this: the prototype falls back to W^ (math.md 2)

// torch.optim.SGD without dampening, on an element whose gradient g holds the weight decay already. Returns the new weight.
template <class V>
RF_ELEMENT V sgd_plain(V w, V g, float lr) {
  return w - lr * g;
}

template <class V>
RF_ELEMENT V sgd_momentum(V w, V g, V& velocity, float lr, float momentum) {
  velocity = momentum * velocity + g;
  return w - lr * velocity;
}

template <class V>
RF_ELEMENT V sgd_nesterov(V w, V g, V& velocity, float lr, float momentum) {
  velocity = momentum * velocity + g;
  return w - lr * (g + momentum * velocity);
}

RF_ELEMENT float from_bfloat16(uint16_t bits) {
  const uint32_t word = uint32_t(bits) << 16;
  float value;
  __builtin_memcpy(&value, &word, sizeof value);
  return value;
}

RF_ELEMENT uint32_t bfloat16_bits(float value) {
  uint32_t word;
  __builtin_memcpy(&word, &value, sizeof word);
  return value != value ? 0x7fff : (word + 0x7fff + ((word >> 16) & 1)) >> 16;
}
