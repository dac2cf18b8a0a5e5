// The only binding file: pointers, sizes and scalars in, results written in place. Tensors are checked in Python.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "cpu/planes.h"
#include "cpu/sweep.h"
#include "cuda/kernels.h"

namespace py = pybind11;
namespace cpu = recog_fast::cpu;
namespace cuda = recog_fast::cuda;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

cpu::Classes classes(uintptr_t weight, uintptr_t memory_rows, uintptr_t strength, uintptr_t slot, int64_t C, int64_t K, int64_t D,
                     int64_t S, bool unit, bool memory_bf16, bool renormalize, uintptr_t members, uintptr_t seen, int64_t all) {
  return {at<const float>(weight), at<const void>(memory_rows), at<const float>(strength), at<const int32_t>(slot), C, K, D, S, unit,
          memory_bf16, renormalize, at<const int32_t>(members), at<const uint8_t>(seen), all};
}

cpu::Rows rows(uintptr_t unit_embeddings, uintptr_t target, uintptr_t rules, int64_t N, float scale, bool half) {
  return {at<const float>(unit_embeddings), at<const int64_t>(target), at<const float>(rules), N, scale, half};
}

cpu::Kept kept(uintptr_t address, int64_t bytes, bool half, bool lists, uintptr_t floor) {
  return {at<void>(address), bytes, half, lists, at<const float>(floor)};
}

std::string select_isa(const std::string& force) {
  const char* name = cpu::select_isa(force.empty() ? nullptr : force.c_str());
  if (name == nullptr)
    throw py::value_error(
        "select_isa: expected one of amx_bf16, avx512_bf16, avx512_vnni, avx512, avx2, baseline that this CPU supports, "
        "emulated_bf16 or emulated_amx, got '" + force + "'");
  return name;
}

double micro_kernel_rate(const std::string& arithmetic, double seconds) {
  if (arithmetic != "float32" && arithmetic != "bfloat16")
    throw py::value_error("micro_kernel_rate: expected arithmetic 'float32' or 'bfloat16', got '" + arithmetic + "'");
  if (!(seconds > 0.0 && seconds < 1e6)) throw py::value_error("micro_kernel_rate: expected 0 < seconds < 1e6, got " + std::to_string(seconds));
  return cpu::micro_kernel_rate(arithmetic == "bfloat16", seconds);
}

#if defined(RECOG_FAST_CUDA_ARCHITECTURES)

cuda::Injection injection(uintptr_t rows, uintptr_t strength, uintptr_t slot, bool bfloat16, bool renormalize) {
  return {at<const void>(rows), at<const float>(strength), at<const int32_t>(slot), bfloat16, renormalize};
}

cuda::Ring ring(uintptr_t rows, uintptr_t strength, uintptr_t stamp, uintptr_t owner, uintptr_t slot, uintptr_t cursor, int64_t S, int64_t C,
                int64_t D, bool bfloat16) {
  return {at<void>(rows), at<float>(strength), at<int64_t>(stamp), at<int64_t>(owner), at<int32_t>(slot), at<int64_t>(cursor), S, C, D, bfloat16};
}

void check_columns(const char* function, int64_t D) {
  if (D < 1 || D > cuda::kMostColumns)
    throw py::value_error(std::string(function) + ": expected 1 <= D <= " + std::to_string(cuda::kMostColumns) + ", got " + std::to_string(D));
}

// What csrc/cuda offers; the address of a tensor is that of device memory, `stream` a cudaStream_t.
void add_cuda_rows(py::module_& m) {
  m.attr("CUDA_MOST_COLUMNS") = cuda::kMostColumns;
  py::class_<cuda::Injection>(m, "CudaInjection", py::module_local())
      .def(py::init(&injection), py::kw_only(), py::arg("rows") = 0, py::arg("strength") = 0, py::arg("slot") = 0, py::arg("bfloat16") = false,
           py::arg("renormalize") = true);
  m.def(
      "cuda_class_step",
      [](uintptr_t d_prototypes, uintptr_t weight, const cuda::Injection& memory, int64_t R, int64_t D, uintptr_t velocity, uintptr_t gradient,
         float lr, float momentum, float weight_decay, bool nesterov, uintptr_t prototypes, bool prototypes_bfloat16,
         const cuda::Injection& next_memory, uintptr_t rates, uintptr_t stream, int device) {
        check_columns("cuda_class_step", D);
        cuda::class_step({at<const float>(d_prototypes), at<float>(weight), at<float>(velocity), at<float>(gradient), R, D, lr, momentum,
                          weight_decay, nesterov, memory, {at<void>(prototypes), prototypes_bfloat16}, next_memory, at<const float>(rates)},
                         {stream, device});
      },
      py::kw_only(), py::arg("d_prototypes"), py::arg("weight"), py::arg("memory"), py::arg("R"), py::arg("D"), py::arg("velocity") = 0,
      py::arg("gradient") = 0, py::arg("lr") = 0.0f, py::arg("momentum") = 0.0f, py::arg("weight_decay") = 0.0f, py::arg("nesterov") = false,
      py::arg("prototypes") = 0, py::arg("prototypes_bfloat16") = false, py::arg("next_memory") = cuda::Injection{}, py::arg("rates") = 0, py::arg("stream"),
      py::arg("device"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "cuda_effective_prototypes",
      [](uintptr_t weight, const cuda::Injection& memory, uintptr_t prototypes, bool bfloat16, int64_t R, int64_t D, uintptr_t stream, int device) {
        check_columns("cuda_effective_prototypes", D);
        cuda::effective_prototypes(at<const float>(weight), R, D, memory, {at<void>(prototypes), bfloat16}, {stream, device});
      },
      py::kw_only(), py::arg("weight"), py::arg("memory"), py::arg("prototypes"), py::arg("bfloat16"), py::arg("R"), py::arg("D"),
      py::arg("stream"), py::arg("device"), py::call_guard<py::gil_scoped_release>());
}

void add_cuda_memory(py::module_& m) {
  m.attr("CUDA_MOST_WRITTEN") = cuda::kMostWritten;
  py::class_<cuda::Ring>(m, "CudaRing", py::module_local())
      .def(py::init(&ring), py::kw_only(), py::arg("rows"), py::arg("strength"), py::arg("stamp"), py::arg("owner"), py::arg("slot"),
           py::arg("cursor"), py::arg("S"), py::arg("C"), py::arg("D"), py::arg("bfloat16"));
  m.def("cuda_memory_write_scratch", &cuda::memory_write_scratch, py::arg("N"), py::arg("S"));
  m.def(
      "cuda_memory_write",
      [](const cuda::Ring& ring, uintptr_t embeddings, uintptr_t labels, uintptr_t strengths, int64_t N, int64_t step, bool bfloat16,
         bool strengths_double, uintptr_t scratch, uintptr_t evicted, uintptr_t stream, int device) {
        cuda::memory_write(ring, {at<const void>(embeddings), at<const int64_t>(labels), at<const void>(strengths), N, step, bfloat16, strengths_double},
                           at<int32_t>(scratch), at<int64_t>(evicted), {stream, device});
      },
      py::arg("ring"), py::kw_only(), py::arg("embeddings"), py::arg("labels"), py::arg("strengths"), py::arg("N"), py::arg("step"),
      py::arg("bfloat16"), py::arg("strengths_double"), py::arg("scratch"), py::arg("evicted"), py::arg("stream"), py::arg("device"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "cuda_norm_statistics",
      [](uintptr_t norms, uintptr_t labelled, int64_t N, bool norms_double, double old, uintptr_t mean, uintptr_t std, uintptr_t batches,
         uintptr_t new_mean, uintptr_t new_std, uintptr_t new_batches, uintptr_t stream, int device) {
        cuda::norm_statistics({at<const void>(norms), at<const bool>(labelled), N, norms_double, old, at<const double>(mean), at<const double>(std),
                               at<const int64_t>(batches), at<double>(new_mean), at<double>(new_std), at<int64_t>(new_batches)},
                              {stream, device});
      },
      py::kw_only(), py::arg("norms"), py::arg("labelled"), py::arg("N"), py::arg("norms_double"), py::arg("old"), py::arg("mean"),
      py::arg("std"), py::arg("batches"), py::arg("new_mean"), py::arg("new_std"), py::arg("new_batches"), py::arg("stream"),
      py::arg("device"), py::call_guard<py::gil_scoped_release>());
}

void add_cuda(py::module_& m) {
  m.def("cuda_missing", &cuda::missing, py::arg("device"), py::call_guard<py::gil_scoped_release>());
  add_cuda_rows(m);
  add_cuda_memory(m);
}

py::object cuda_built() { return py::make_tuple(RECOG_FAST_CUDA_VERSION, RECOG_FAST_CUDA_ARCHITECTURES); }

#else

#if !defined(RECOG_FAST_CUDA_MISSING)
#define RECOG_FAST_CUDA_MISSING "not asked for"
#endif

void add_cuda(py::module_& m) { m.attr("CUDA_MISSING") = RECOG_FAST_CUDA_MISSING; }
py::object cuda_built() { return py::none(); }

#endif

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "recog_fast's compiled kernels: CPU sweeps over classes, and where nvcc was there, CUDA kernels over rows of W.";
  add_cuda(m);
  m.def("cuda_built", &cuda_built);
  m.def("select_isa", &select_isa, py::arg("force") = "");
  m.def("active_isa", &cpu::active_isa);
  m.def("runs_isa", &cpu::runs_isa, py::arg("name"));
  m.def("pair_format", &cpu::pair_format);
  m.def("micro_kernel_rate", &micro_kernel_rate, py::arg("arithmetic"), py::arg("seconds"), py::call_guard<py::gil_scoped_release>());

  py::class_<cpu::Classes>(m, "Classes", py::module_local())
      .def(py::init(&classes), py::kw_only(), py::arg("weight"), py::arg("memory_rows"), py::arg("strength"), py::arg("slot"),
           py::arg("C"), py::arg("K"), py::arg("D"), py::arg("S"), py::arg("unit"), py::arg("memory_bf16"), py::arg("renormalize"),
           py::arg("members") = 0, py::arg("seen") = 0, py::arg("all") = 0);
  py::class_<cpu::Rows>(m, "Rows", py::module_local()).def(py::init(&rows), py::kw_only(), py::arg("unit_embeddings"), py::arg("target"),
                                       py::arg("rules"), py::arg("N"), py::arg("scale"), py::arg("half"));
  py::class_<cpu::Kept>(m, "Kept", py::module_local()).def(py::init(&kept), py::kw_only(), py::arg("address") = 0, py::arg("bytes") = 0,
                                       py::arg("half") = false, py::arg("lists") = false, py::arg("floor") = 0);
  m.def("kept_bytes", &cpu::kept_bytes, py::arg("classes"), py::arg("N"), py::arg("half"), py::arg("keep_half"), py::arg("lists") = false);

  m.def(
      "row_sweep",
      [](const cpu::Classes& c, const cpu::Rows& r, uintptr_t lse, uintptr_t cosine, uintptr_t index, uintptr_t pull,
         const cpu::Kept& kept, int threads, uintptr_t listed) {
        cpu::row_sweep(c, r, {at<double>(lse), at<float>(cosine), at<int64_t>(index), at<float>(pull), at<double>(listed)}, kept, threads);
      },
      py::arg("classes"), py::arg("rows"), py::kw_only(), py::arg("lse"), py::arg("nearest_cosine"), py::arg("nearest_index"),
      py::arg("pull"), py::arg("kept"), py::arg("threads"), py::arg("listed") = 0, py::call_guard<py::gil_scoped_release>());

  m.def(
      "unknown_sweep",
      [](const cpu::Classes& c, const cpu::Rows& r, uintptr_t lse, uintptr_t first_mean, uintptr_t mass,
         uintptr_t remainder, uintptr_t mean, uintptr_t pull, int threads, uintptr_t low) {
        cpu::unknown_sweep(c, r,
                           {at<const double>(lse), at<const float>(first_mean), at<double>(mass), at<double>(remainder),
                            at<double>(mean), at<float>(pull), at<const float>(low)},
                           threads);
      },
      py::arg("classes"), py::arg("rows"), py::kw_only(), py::arg("lse"), py::arg("first_mean"), py::arg("mass"),
      py::arg("remainder"), py::arg("mean"), py::arg("pull"), py::arg("threads"), py::arg("low") = 0,
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "class_sweep",
      [](const cpu::Classes& c, const cpu::Rows& r, uintptr_t terms, int mode, uintptr_t gradient, uintptr_t weight,
         uintptr_t velocity, float lr, float momentum, float weight_decay, bool nesterov, bool sparse,
         const cpu::Kept& kept, int threads) {
        const float* t = at<const float>(terms);
        const cpu::RowTerms row_terms{t, t + r.N, t + 2 * r.N, t + 3 * r.N, t + 4 * r.N};
        cpu::class_sweep(c, r, row_terms,
                         {mode, at<float>(gradient), at<float>(weight), at<float>(velocity), lr, momentum, weight_decay, nesterov, sparse},
                         kept, threads);
      },
      py::arg("classes"), py::arg("rows"), py::kw_only(), py::arg("terms"), py::arg("mode"), py::arg("gradient") = 0,
      py::arg("weight") = 0, py::arg("velocity") = 0, py::arg("lr") = 0.0f, py::arg("momentum") = 0.0f,
      py::arg("weight_decay") = 0.0f, py::arg("nesterov") = false, py::arg("sparse") = false, py::arg("kept"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "join_planes",
      [](uintptr_t high, uintptr_t low, uintptr_t out, int64_t n, int threads) {
        cpu::join_planes(at<const uint16_t>(high), at<const int16_t>(low), at<float>(out), n, threads);
      },
      py::kw_only(), py::arg("high"), py::arg("low"), py::arg("out"), py::arg("n"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "split_planes",
      [](uintptr_t values, uintptr_t high, uintptr_t low, int64_t n, int threads) {
        cpu::split_planes(at<const float>(values), at<uint16_t>(high), at<int16_t>(low), n, threads);
      },
      py::kw_only(), py::arg("values"), py::arg("high"), py::arg("low"), py::arg("n"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "round_by_chance",
      [](uintptr_t values, uintptr_t rounded, int64_t R, int64_t D, int64_t seed, int64_t step, int64_t first, int threads) {
        cpu::round_by_chance(at<const float>(values), at<uint16_t>(rounded), R, D, {seed, step, first}, threads);
      },
      py::kw_only(), py::arg("values"), py::arg("rounded"), py::arg("R"), py::arg("D"), py::arg("seed"), py::arg("step"), py::arg("first"),
      py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  m.def(
      "effective_prototypes",
      [](const cpu::Classes& c, uintptr_t prototypes, int threads) { cpu::effective_prototypes(c, at<float>(prototypes), threads); },
      py::arg("classes"), py::kw_only(), py::arg("prototypes"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
}
