# find_package(rmsnorm_cuda 0.1): that version or a later one.
file(STRINGS "${CMAKE_CURRENT_LIST_DIR}/../../__init__.py" _version REGEX "^__version__ = ")
string(REGEX MATCH "[0-9.]+" PACKAGE_VERSION "${_version}")
if(NOT PACKAGE_VERSION VERSION_LESS PACKAGE_FIND_VERSION)
  set(PACKAGE_VERSION_COMPATIBLE TRUE)
endif()
if(PACKAGE_VERSION VERSION_EQUAL PACKAGE_FIND_VERSION)
  set(PACKAGE_VERSION_EXACT TRUE)
endif()
