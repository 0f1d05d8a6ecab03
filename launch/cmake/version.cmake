# Included by the build: target attamba_version writes generated/version.inc at build time, and touches it only when something
# in it changed, so that a new commit recompiles one file.
# Run as a script (cmake -P, with OUTPUT, SOURCE_DIR, VERSION, BUILD_TYPE, COMPILER): writes it.

if(NOT CMAKE_SCRIPT_MODE_FILE)
  set(ATTAMBA_VERSION_FILE ${PROJECT_BINARY_DIR}/generated/version.inc)
  add_custom_target(attamba_version
    COMMAND ${CMAKE_COMMAND} -DOUTPUT=${ATTAMBA_VERSION_FILE} -DSOURCE_DIR=${PROJECT_SOURCE_DIR} -DVERSION=${PROJECT_VERSION}
            -DBUILD_TYPE=$<CONFIG> "-DCOMPILER=${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}"
            -P ${CMAKE_CURRENT_LIST_FILE}
    BYPRODUCTS ${ATTAMBA_VERSION_FILE}
    COMMENT "" VERBATIM)
  return()
endif()

set(commit unknown)
find_program(GIT_PROGRAM git)
if(GIT_PROGRAM)
  execute_process(COMMAND ${GIT_PROGRAM} -C ${SOURCE_DIR} describe --always --dirty --exclude=* --abbrev=12
                  OUTPUT_VARIABLE described RESULT_VARIABLE failed ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(NOT failed)
    set(commit ${described})
  endif()
endif()
set(text "#define ATTAMBA_VERSION \"${VERSION}\"\n#define ATTAMBA_COMMIT \"${commit}\"\n")
string(APPEND text "#define ATTAMBA_BUILD_TYPE \"${BUILD_TYPE}\"\n#define ATTAMBA_COMPILER \"${COMPILER}\"\n")
set(old "")
if(EXISTS ${OUTPUT})
  file(READ ${OUTPUT} old)
endif()
if(NOT old STREQUAL text)
  file(WRITE ${OUTPUT} "${text}")
endif()
