# For find_package(rmsnorm_cuda CONFIG) in a C++ project. `python -m rmsnorm_cuda --cmake-dir`
# prints the rmsnorm_cuda_DIR for it.
#
#   rmsnorm_cuda::rmsnorm        librmsnorm.so and rmsnorm.h: the kernels; neither torch nor Python
#   rmsnorm_cuda::rmsnorm_torch  librmsnorm_torch.so: torch's ops, for a server that links libtorch
#
# There is a librmsnorm_torch.so for each version of torch. rmsnorm_cuda_TORCH ("2.15") names the
# version. If it is not set, the version is that of the torch whose headers CMake finds, in
# CMAKE_PREFIX_PATH or by find_package(Torch). What build_layers.py made for it is preferred.
#
# Paths are relative to this file: in a wheel, an editable install and the source tree alike.
if(TARGET rmsnorm_cuda::rmsnorm)
  return()
endif()
get_filename_component(_rmsnorm_cuda "${CMAKE_CURRENT_LIST_DIR}/../.." ABSOLUTE)
foreach(_file include/rmsnorm.h lib/librmsnorm.so)
  if(NOT EXISTS "${_rmsnorm_cuda}/${_file}")
    set(rmsnorm_cuda_FOUND FALSE)
    set(rmsnorm_cuda_NOT_FOUND_MESSAGE
      "${_rmsnorm_cuda}/${_file} is not there: rmsnorm_cuda is not built.")
    return()
  endif()
endforeach()

add_library(rmsnorm_cuda::rmsnorm SHARED IMPORTED)
set_target_properties(rmsnorm_cuda::rmsnorm PROPERTIES
  IMPORTED_LOCATION "${_rmsnorm_cuda}/lib/librmsnorm.so"
  IMPORTED_SONAME librmsnorm.so
  INTERFACE_INCLUDE_DIRECTORIES "${_rmsnorm_cuda}/include"
  INTERFACE_COMPILE_FEATURES cxx_std_17)

if(NOT rmsnorm_cuda_TORCH)
  unset(_rmsnorm_cuda_version CACHE)
  find_file(_rmsnorm_cuda_version torch/headeronly/version.h HINTS ${TORCH_INCLUDE_DIRS})
  if(_rmsnorm_cuda_version)
    file(READ "${_rmsnorm_cuda_version}" _header)
    string(REGEX REPLACE ".*VERSION_MAJOR ([0-9]+).*VERSION_MINOR ([0-9]+).*" "\\1.\\2"
      rmsnorm_cuda_TORCH "${_header}")
  endif()
endif()
set(_ops "lib/torch${rmsnorm_cuda_TORCH}/librmsnorm_torch.so")
file(GLOB _built RELATIVE "${_rmsnorm_cuda}"
  "${_rmsnorm_cuda}/lib/torch${rmsnorm_cuda_TORCH}.*/librmsnorm_torch.so")
foreach(_file ${_built})
  set(_ops "${_file}")
endforeach()
if(EXISTS "${_rmsnorm_cuda}/${_ops}")
  # Nothing refers to a symbol of it, since ops register themselves when it is loaded: the linker
  # must not leave it out for that.
  add_library(rmsnorm_cuda::rmsnorm_torch SHARED IMPORTED)
  set_target_properties(rmsnorm_cuda::rmsnorm_torch PROPERTIES
    IMPORTED_LOCATION "${_rmsnorm_cuda}/${_ops}"
    IMPORTED_SONAME librmsnorm_torch.so
    IMPORTED_LINK_DEPENDENT_LIBRARIES rmsnorm_cuda::rmsnorm
    INTERFACE_LINK_OPTIONS "LINKER:--no-as-needed")
elseif(NOT rmsnorm_cuda_TORCH)
  message(STATUS "rmsnorm_cuda: without rmsnorm_cuda::rmsnorm_torch, since torch was not found "
    "before; find_package(Torch) first, or set rmsnorm_cuda_TORCH")
else()
  message(STATUS "rmsnorm_cuda: without rmsnorm_cuda::rmsnorm_torch, since there is no ${_ops} in "
    "${_rmsnorm_cuda}")
endif()
unset(_rmsnorm_cuda)
unset(_ops)
